"""A training step (forward, backward, AdamW, float32) of ours and of PyTorch's, in turn, as ratios.

    python benchmarks/train_step.py [--rounds 7] [--compile] [-o results.json]

The model: V 4096, d 256, 6 layers, 4 heads × 64, d_ffw 1024, CCA in layers 3 and 6, an encoder of 2 layers, n 512,
m 64, k 2, r 128, 4 sequences. Each peer runs in a process of its own and takes one step when its turn comes, so that
neither's threads and caches are in the other's way. Before the timing, the losses of the first steps are compared.
"""

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import time

import numpy as np

SEED, BATCH, N, K = 0, 4, 512, 2
SGEMM = 2048


def setting():
    """(config, params, tokens, targets, neighbours), the same for every peer."""
    from retro_np import EncoderConfig, RetroConfig, init_params

    encoder = EncoderConfig(256, 1024, 4, 64, 2, (1,))
    config = RetroConfig(4096, 256, 1024, 4, 64, 6, (3, 6), 64, encoder)
    rng = np.random.default_rng(SEED)
    params = init_params(config, rng)
    draw = [
        rng.integers(1, config.vocabulary_size, shape) for shape in ((BATCH, N), (BATCH, N), (BATCH, N // 64, K, 128))
    ]
    return config, params, *draw


def ours():
    """A function that takes a step and returns the loss."""
    from retro_np import adamw_init, adamw_update, retro_loss

    config, params, tokens, targets, neighbours = setting()
    state = adamw_init(params)

    def step():
        loss, vjp = retro_loss(params, config, tokens, targets, neighbours)
        adamw_update(params, vjp(1.0), state, lr=1e-4)
        return float(loss)

    return step


def torch_eager(compiled=False):
    """The same in PyTorch."""
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


def torch_compiled():
    """PyTorch with torch.compile."""
    return torch_eager(compiled=True)


def sgemm():
    """A function that multiplies square float32 matrices: what the machine can do at that moment."""
    a = np.random.default_rng(0).standard_normal((SGEMM, SGEMM), dtype=np.float32)
    return lambda: float((a @ a)[0, 0])


def serve(make, pipe):
    """Take a step whenever asked; answer (seconds, loss, peak MB so far)."""
    step = make()
    while pipe.recv():
        began = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - began
        pipe.send((seconds, loss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def main():
    """Print a row a peer, and save them all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="torch.compile as a peer too (minutes to compile)")
    parser.add_argument("-o", "--out", help="write the figures as JSON")
    options = parser.parse_args()
    makers = {"retro_np": ours, "PyTorch, eager": torch_eager, "sgemm": sgemm}
    if options.compile:
        makers["PyTorch, compiled"] = torch_compiled
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for name, make in makers.items():
        pipes[name], theirs = context.Pipe()
        context.Process(target=serve, args=(make, theirs), daemon=True).start()

    def turn(name):
        pipes[name].send(True)
        return pipes[name].recv()

    losses = {name: [turn(name)[1] for _ in range(3)] for name in makers if name != "sgemm"}
    for name, found in losses.items():
        if not np.allclose(found, losses["retro_np"], rtol=1e-3):
            raise SystemExit(f"{name} computes another loss, {found}, than ours, {losses['retro_np']}")
    turn("sgemm")
    rounds = [{name: turn(name) for name in makers} for _ in range(options.rounds)]
    rows = {}
    for name in makers:
        ratios = sorted(one[name][0] / one["retro_np"][0] for one in rounds)
        seconds = statistics.median(one[name][0] for one in rounds)
        rows[name] = {"seconds": seconds, "times_ours": statistics.median(ratios), "from": ratios[0], "to": ratios[-1]}
        rows[name]["peak_mb"] = rounds[-1][name][2]
        if name == "sgemm":
            print(f"sgemm of {SGEMM}: {2 * SGEMM**3 / seconds / 1e9:.0f} GFLOP/s")
        else:
            print(f"{name:18} {seconds:6.2f} s   {statistics.median(ratios):5.2f} × ours "
                  f"({ratios[0]:.2f} … {ratios[-1]:.2f})   peak {rows[name]['peak_mb']:.0f} MB")  # fmt: skip
    for pipe in pipes.values():
        pipe.send(False)
    if options.out:
        machine = {"machine": platform.processor() or platform.machine(), "numpy": np.__version__}
        with open(options.out, "w") as file:
            json.dump({"rows": rows, **machine}, file, indent=2)


if __name__ == "__main__":
    main()
