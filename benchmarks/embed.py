"""Chunks per second that MiniLM embeds in retro_np, in onnxruntime (float32) and in sentence-transformers.

    python benchmarks/embed.py [--chunks 512] [--rounds 5] [-o results.json]

The texts are chunks of the standard library, as long as RETRO's chunks of 64 tokens. Each peer runs in its own process.
In each round every peer tokenises and embeds the same texts and pools by the mean. The keys are compared before the
timing. onnxruntime runs a model that PyTorch exported and onnxruntime's optimiser fused. The texts are sorted by length
and passed to it in batches of the fastest size. sentence-transformers runs with its defaults.
"""

import argparse
import sysconfig
import tempfile
from pathlib import Path

import retro_np  # imported first, so that BLAS threads sleep as they do in the commands

# isort: split
import numpy as np
from turns import compare, machine, save

from retro_np.retrieval.weights import find_bert

CHUNK_CHARACTERS = 170  # about 64 tokens of a BPE with a vocabulary of 4096 tokens


def texts(count):
    """Chunks of the standard library's modules, the same for every peer."""
    chunks = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        chunks += [text[i : i + CHUNK_CHARACTERS] for i in range(0, len(text) - CHUNK_CHARACTERS, CHUNK_CHARACTERS)]
    chosen = np.random.default_rng(0).choice(len(chunks), count, replace=False)
    return [chunks[i] for i in chosen]


def retro_np_bert(count):
    """retro_np's BERT."""
    bert, chunks = retro_np.load_bert(), texts(count)
    return lambda: bert.embed(chunks, show_progress=False)


def onnx(count, batch=32):
    """onnxruntime with the exported and fused model."""
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
    """Export a BERT to ONNX, with variable batch size and length."""
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
    """SentenceTransformer.encode."""
    from sentence_transformers import SentenceTransformer

    model, chunks = SentenceTransformer(str(find_bert()), device="cpu"), texts(count)
    return lambda: model.encode(chunks, show_progress_bar=False)


PEERS = {"retro_np": retro_np_bert, "onnxruntime": onnx, "sentence-transformers": sentence_transformers}


def main():
    """Print a row for each peer, and save the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--out", help="write the figures to this JSON file")
    options = parser.parse_args()
    rows = compare(PEERS, options.rounds, (options.chunks,), same=lambda a, b: np.abs(a - b).max() < 1e-4)
    for name, row in rows.items():
        row["chunks_a_second"] = options.chunks / row["seconds"]
        print(f"{name:22} {row['chunks_a_second']:6.0f} chunks/s   takes {row['times_ours']:.2f} × retro_np's time "
              f"({row['from']:.2f} … {row['to']:.2f})   peak {row['peak_mb']:.0f} MB")  # fmt: skip
    save(options.out, {"rows": rows, "machine": machine()})


if __name__ == "__main__":
    main()
