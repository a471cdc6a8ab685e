"""A training step (forward, backward, AdamW, float32) in retro_np and in PyTorch, timed in turns, as ratios.

    python benchmarks/train_step.py [--rounds 7] [--without compile,retro-pytorch] [-o results.json]

The model: V 4096, d 256, 6 layers, 4 heads × 64, d_ffw 1024, CCA in layers 3 and 6, an encoder of 2 layers, n 512,
m 64, k 2, r 128, 4 sequences. Peers: a port to PyTorch (torch_peer.py), the same compiled by torch.compile, and
RETRO-pytorch as its users run it. RETRO-pytorch has the same sizes, except that it always has 8 heads. It is a
different model, for example with rotary positions, so only its time is compared. Each peer runs in its own process and
takes one step per turn.

A step's FLOPs are those of its matrix products, three times as many as in the forward pass. A multiplication and an
addition count as two. Attention counts all pairs of query and key, masked or not. The step's rate is compared with the
rate that sgemm reaches in the same rounds, which shows how much of the cores' speed a step uses.
"""

import argparse

import retro_np  # imported first, so that BLAS threads sleep as they do in the commands

# isort: split
import numpy as np
from turns import compare, machine, save

SEED, BATCH, N, K, R = 0, 4, 512, 2, 128
SGEMM = 2048  # rows and columns of the matrices


def setting():
    """(config, params, tokens, targets, neighbours), the same for every peer."""
    encoder = retro_np.EncoderConfig(256, 1024, 4, 64, 2, (1,))
    config = retro_np.RetroConfig(4096, 256, 1024, 4, 64, 6, (3, 6), 64, encoder)
    rng = np.random.default_rng(SEED)
    params = retro_np.init_params(config, rng)
    shapes = ((BATCH, N), (BATCH, N), (BATCH, N // config.chunk_size, K, R))
    return config, params, *(rng.integers(1, config.vocabulary_size, shape) for shape in shapes)


def retro_np_step():
    """A function that takes a step and returns the loss."""
    config, params, tokens, targets, neighbours = setting()
    state = retro_np.adamw_init(params)

    def step():
        loss, vjp = retro_np.retro_loss(params, config, tokens, targets, neighbours)
        retro_np.adamw_update(params, vjp(1.0), state, lr=1e-4)
        return float(loss)

    return step


def eager(compiled=False):
    """A function that takes the same step in PyTorch."""
    import torch
    import torch_peer

    config, params, *batch = setting()
    params, batch = torch_peer.tensors(params), [torch.tensor(array) for array in batch]
    optimiser = torch.optim.AdamW(
        [{"params": [leaf for leaf in torch_peer.leaves(params) if (leaf.ndim > 1) == decayed],
          "weight_decay": 0.1 * decayed} for decayed in (True, False)],
        lr=1e-4, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    loss_of = torch.compile(torch_peer.loss) if compiled else torch_peer.loss

    def step():
        loss = loss_of(params, config, *batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return float(loss.detach())

    return step


def compiled():
    """PyTorch with torch.compile."""
    return eager(compiled=True)


def retro_pytorch():
    """The RETRO-pytorch package: its model, loss and AdamW. A step returns no loss, because the model is different."""
    import torch
    from retro_pytorch import RETRO
    from retro_pytorch.optimizer import get_optimizer

    config, _, tokens, targets, neighbours = setting()
    e = config.encoder
    model = RETRO(
        num_tokens=config.vocabulary_size, chunk_size=config.chunk_size, max_seq_len=N, enc_dim=e.d_model,
        enc_depth=e.n_layers, enc_cross_attn_layers=e.ca_layers, dec_dim=config.d_model, dec_depth=config.n_layers,
        dec_cross_attn_layers=config.cca_layers, heads=config.n_heads, dim_head=config.d_head,
        enc_attn_dropout=0.0, enc_ff_dropout=0.0, dec_attn_dropout=0.0, dec_ff_dropout=0.0,
    )  # fmt: skip
    optimiser = get_optimizer(model.parameters(), lr=1e-4, wd=0.1)
    sequence = torch.tensor(np.concatenate([tokens, targets[:, -1:]], axis=1))
    retrieved = torch.tensor(neighbours)

    def step():
        loss = model(sequence, retrieved, return_loss=True)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def sgemm():
    """A product of square float32 matrices, which shows the rate that the cores reach at that moment."""
    a = np.random.default_rng(SEED).standard_normal((SGEMM, SGEMM), dtype=np.float32)

    def step():
        a @ a

    return step


def flops():
    """The floating-point operations of a step, in linear layers and in attention."""
    config, params, *_ = setting()
    e, tokens, keys = config.encoder, BATCH * N, BATCH * (N // config.chunk_size) * K * R

    def weights(tree, excluded=()):
        return sum(leaf.size for name, leaf in tree.items() if leaf.ndim == 2 and name not in (*excluded, "u", "v"))

    def pairs(block, queries, seen, distances):  # keys and values by pair, positions by distance
        return 2 * block["w_q"].shape[1] * queries * (2 * seen + distances)

    linear, attention = tokens * params["readout"].size, 0
    for layer in params["layers"]:
        linear += tokens * (weights(layer["attention"], ["w_r"]) + weights(layer["ffw"]))
        attention += pairs(layer["attention"], tokens, N, N)
        if "cca" in layer:
            query_and_output = layer["cca"]["w_q"].size + layer["cca"]["w_o"].size
            linear += tokens * query_and_output + keys * (weights(layer["cca"], ["w_r"]) - query_and_output)
            attention += pairs(layer["cca"], tokens, K * R, R)
    for p, layer in enumerate(params["encoder"]["layers"], start=1):
        linear += keys * (weights(layer["attention"], ["w_r"]) + weights(layer["ffw"]))
        attention += pairs(layer["attention"], keys, R, R)
        if p in e.ca_layers:
            block = layer["cross_attention"]
            query_and_output = block["w_q"].size + block["w_o"].size
            linear += keys * query_and_output + tokens * (weights(block, ["w_r"]) - query_and_output)
            attention += pairs(block, keys, config.chunk_size, config.chunk_size)
    return 3 * 2 * linear, 3 * attention


PEERS = {
    "PyTorch, eager": eager,
    "PyTorch, compile": compiled,
    "RETRO-pytorch": retro_pytorch,
}


def main():
    """Print one row per peer, and save them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--without", default="", help="peers to leave out: compile, retro-pytorch")
    parser.add_argument("--tuned", default="", help="peers that also get retro_np's process settings")
    parser.add_argument("-o", "--out", help="write the figures as JSON")
    options = parser.parse_args()
    left_out = [name for name in options.without.lower().split(",") if name]
    other_peers = {name: make for name, make in PEERS.items() if not any(part in name.lower() for part in left_out)}
    peers = {"retro_np": retro_np_step} | other_peers
    rows = compare(
        peers | {"sgemm": sgemm},
        options.rounds,
        tuned=("sgemm", *options.tuned.split(",")),
        same=lambda a, b: abs(a - b) < 1e-3 * abs(a),
    )
    product = rows.pop("sgemm")
    linear, attention = flops()
    gflops = (linear + attention) / rows["retro_np"]["seconds"] / 1e9
    share = (linear + attention) * product["times_ours"] / (2 * SGEMM**3)  # both timed in the same rounds
    for name, row in rows.items():
        print(f"{name:18} {row['seconds']:6.2f} s   {row['times_ours']:5.2f} × retro_np "
              f"({row['from']:.2f} … {row['to']:.2f})   peak {row['peak_mb']:.0f} MB")  # fmt: skip
    print(f"{linear / 1e9:.0f} GFLOP in linear layers and {attention / 1e9:.0f} in attention: {gflops:.0f} GFLOP/s, "
          f"{share:.0%} of what sgemm reaches ({SGEMM} × {SGEMM})")  # fmt: skip
    work = {"linear_flop": linear, "attention_flop": attention, "gflops": gflops, "share_of_sgemm": share}
    save(options.out, {"rows": rows, "work": work, "machine": machine()})


if __name__ == "__main__":
    main()
