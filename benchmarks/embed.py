"""MiniLM chunks a second: ours, onnxruntime (float32) and sentence-transformers, in turn, as ratios.

    python benchmarks/embed.py [--chunks 512] [--rounds 5] [-o results.json]

The texts are chunks of the standard library, of as many word pieces as RETRO's chunks of 64 tokens have. Each peer runs
in a process of its own, takes the same texts when its turn comes, tokenises them, and pools by the mean; the keys are
compared before the timing. onnxruntime gets the model exported by PyTorch and fused by its own optimiser for BERT, and
the texts in order of length, in batches of the size that suited it best. sentence-transformers runs as its users run
it.
"""

import argparse
import sysconfig
import tempfile
from pathlib import Path

import retro_np  # first, so that BLAS threads sleep as they do in the commands

# isort: split
import numpy as np
from turns import compare, machine, save

from retro_np.retrieval.weights import find_bert

BYTES = 170  # of a chunk: 64 tokens of a BPE of 4096 on this text


def texts(count):
    """Chunks of the standard library's modules, the same for every peer."""
    found = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        found += [text[i : i + BYTES] for i in range(0, len(text) - BYTES, BYTES)]
    chosen = np.random.default_rng(0).choice(len(found), count, replace=False)
    return [found[i] for i in chosen]


def ours(count):
    """Embeds all texts; returns a number made of the keys."""
    bert, chunks = retro_np.load_bert(), texts(count)
    return lambda: bert.embed(chunks, show_progress=False)


def onnx(count, batch=32):
    """onnxruntime on the exported and fused model."""
    import onnxruntime
    from onnxruntime.transformers import optimizer

    bert, chunks = retro_np.load_bert(), texts(count)
    folder = Path(tempfile.mkdtemp())
    config = bert.files.config
    export(find_bert(), folder / "model.onnx")
    fused = optimizer.optimize_model(
        str(folder / "model.onnx"), "bert", num_heads=config["num_attention_heads"], hidden_size=config["hidden_size"]
    )
    fused.save_model_to_file(str(folder / "fused.onnx"))
    session = onnxruntime.InferenceSession(str(folder / "fused.onnx"), providers=["CPUExecutionProvider"])

    def embed():
        pieces = bert.word_pieces(chunks)
        order = np.argsort([len(p) for p in pieces], kind="stable")
        keys = np.empty((len(chunks), bert.d_key), np.float32)
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            longest = max(len(pieces[row]) for row in rows)
            ids = np.zeros((len(rows), longest), np.int64)
            for i, row in enumerate(rows):
                ids[i, : len(pieces[row])] = pieces[row]
            mask = np.arange(longest) < np.array([[len(pieces[row])] for row in rows])
            (states,) = session.run(None, {"input_ids": ids, "attention_mask": mask.astype(np.int64)})
            means = (states * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
            keys[rows] = means / np.linalg.norm(means, axis=1, keepdims=True)
        return keys

    return embed


def export(folder, path):
    """The model of a folder as ONNX, with any batch and length."""
    import torch
    from transformers import BertModel

    class States(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = BertModel.from_pretrained(folder, add_pooling_layer=False, attn_implementation="eager")

        def forward(self, input_ids, attention_mask):
            return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    example = torch.ones((2, 8), dtype=torch.long)
    axes = {0: "batch", 1: "length"}
    torch.onnx.export(
        States().eval(), (example, example), str(path), input_names=["input_ids", "attention_mask"],
        output_names=["states"], dynamic_axes={"input_ids": axes, "attention_mask": axes, "states": axes},
        opset_version=17, dynamo=False,
    )  # fmt: skip


def sentence_transformers(count):
    """sentence-transformers' own encode."""
    from sentence_transformers import SentenceTransformer

    model, chunks = SentenceTransformer(str(find_bert()), device="cpu"), texts(count)
    return lambda: model.encode(chunks, show_progress_bar=False)


PEERS = {"retro_np": ours, "onnxruntime": onnx, "sentence-transformers": sentence_transformers}


def main():
    """Print a row a peer, and save them all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--out", help="write the figures as JSON")
    options = parser.parse_args()
    rows = compare(PEERS, options.rounds, (options.chunks,), same=lambda a, b: np.abs(a - b).max() < 1e-4)
    for name, row in rows.items():
        row["chunks_a_second"] = options.chunks / row["seconds"]
        print(f"{name:22} {row['chunks_a_second']:6.0f} chunks/s   takes {row['times_ours']:.2f} × our time "
              f"({row['from']:.2f} … {row['to']:.2f})   peak {row['peak_mb']:.0f} MB")  # fmt: skip
    save(options.out, {"rows": rows, "machine": machine()})


if __name__ == "__main__":
    main()
