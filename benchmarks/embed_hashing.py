"""The hashing embedder: chunks of 64 tokens a second, beside MiniLM's, and what its neighbours are worth.

    python benchmarks/embed_hashing.py [--chunks 100000] [--rounds 5] [--bytes 1000000] [-o results.json]

Worth is measured as retrieval uses it. Modules of the standard library are cut into chunks, a tenth of the modules held
out; for each chunk of these the two nearest values [N, F] of the others are retrieved, exactly, and the longest run of
tokens that a value has in common with the chunk's continuation is taken, in tokens on the mean. Random values bound it
from below; keys of so many columns that the projection adds next to no noise, from above.
"""

import argparse
import sysconfig
from functools import partial
from pathlib import Path

import retro_np  # first, so that BLAS threads sleep as they do in the commands

# isort: split
import numpy as np
from turns import compare, machine, save

from retro_np.kernels.hashing import BUCKETS
from retro_np.kernels.search import exact_search
from retro_np.kernels.substring import longest_common_substring
from retro_np.retrieval.corpus import held_out
from retro_np.retrieval.hashing import HashingEmbedder, count_features
from retro_np.retrieval.tokenizer import decode, encode, train_tokenizer

M, VOCABULARY = 64, 4096
WIDTHS = (64, 128, 256)
EXACT = 2048  # columns: a cosine's noise is 0.02
MINILM = 256  # chunks of its turn
QUERIES = 1000


def modules(limit):
    """Texts of the standard library's modules by name, about `limit` bytes."""
    found, total = {}, 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if total < limit:
            found[path.name] = path.read_text(encoding="utf-8", errors="replace")
            total += len(found[path.name])
    return found


def chunked(tokenizer, texts):
    """Chunks (N, m), and their continuations, padding at a document's end."""
    chunks, following = [], []
    for text in texts:
        ids = encode(tokenizer, text)
        rows = np.zeros((-(-len(ids) // M), M), np.int64)
        rows.reshape(-1)[: len(ids)] = ids
        chunks.append(rows)
        following.append(np.concatenate([rows[1:], np.zeros((min(1, len(rows)), M), np.int64)]))
    return np.concatenate(chunks), np.concatenate(following)


def embedder(tokenizer, chunks, d_key):
    """One whose weights are counted over the chunks."""
    counts = np.zeros(BUCKETS, np.uint32)
    count_features(chunks, counts)
    return HashingEmbedder(tokenizer, counts, len(chunks), d_key)


def ours(d_key, count, limit):
    """Embeds the same chunks over and over, until they are as many as asked."""
    texts = modules(limit).values()
    tokenizer = train_tokenizer(texts, VOCABULARY)
    chunks, _ = chunked(tokenizer, texts)
    made, many = embedder(tokenizer, chunks, d_key), np.resize(chunks, (count, M)).astype(np.uint16)
    return lambda: made.embed_tokens(many)[:1]


def minilm(count, limit):
    """Embeds MINILM of the texts."""
    texts = modules(limit).values()
    tokenizer = train_tokenizer(texts, VOCABULARY)
    chunks, _ = chunked(tokenizer, texts)
    some = np.random.default_rng(0).choice(len(chunks), MINILM, replace=False)
    decoded, bert = [decode(tokenizer, chunk) for chunk in chunks[some]], retro_np.load_bert()
    return lambda: bert.embed(decoded, show_progress=False)[:1]


def worth(limit):
    """Tokens in common with the continuation, on the mean, by embedder."""
    texts = modules(limit)
    kept = [text for name, text in texts.items() if not held_out(name, 0.1)]
    tokenizer = train_tokenizer(kept, VOCABULARY)
    chunks, following = chunked(tokenizer, kept)
    queries, continuations = chunked(tokenizer, [text for name, text in texts.items() if held_out(name, 0.1)])
    rng = np.random.default_rng(0)
    whole = np.flatnonzero(continuations.any(axis=1))
    some = np.sort(rng.choice(whole, min(QUERIES, len(whole)), replace=False))
    queries, continuations = queries[some], continuations[some]

    def common(ids):
        return longest_common_substring(continuations, np.concatenate([chunks, following], axis=1)[ids]).mean()

    found = {"random values": common(rng.integers(0, len(chunks), (len(queries), 2)))}
    for d_key in (*WIDTHS, EXACT):
        made = embedder(tokenizer, chunks, d_key)
        found[f"hashing, {d_key}"] = common(exact_search(made.embed_tokens(queries), made.embed_tokens(chunks), 2)[0])
    bert = retro_np.load_bert()
    keys, asked = (bert.embed([decode(tokenizer, chunk) for chunk in some]) for some in (chunks, queries))
    found["MiniLM"] = common(exact_search(asked, keys, 2)[0])
    return {"tokens_in_common": found, "chunks": len(chunks), "queries": len(queries)}


def main():
    """Print a row an embedder, and save them all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bytes", type=int, default=1_000_000, help="of text; MiniLM takes a minute for a million")
    parser.add_argument("-o", "--out", help="write the figures as JSON")
    options = parser.parse_args()
    makers = {f"hashing, {d_key}": partial(ours, d_key) for d_key in WIDTHS} | {"MiniLM": minilm}
    rows = compare(makers, options.rounds, (options.chunks, options.bytes))
    for name, row in rows.items():
        rate = (MINILM if name == "MiniLM" else options.chunks) / row["seconds"]
        # turns are of different lengths: the rates alone compare
        rows[name] = {"seconds": row["seconds"], "chunks_a_second": rate, "peak_mb": row["peak_mb"]}
        print(f"{name:16} {rate:8.0f} chunks/s   peak {row['peak_mb']:.0f} MB")
    found = worth(options.bytes)
    for name, tokens in found["tokens_in_common"].items():
        print(f"{name:16} {tokens:8.2f} tokens in common with the continuation")
    save(options.out, {"rows": rows, "worth": found, "machine": machine()})


if __name__ == "__main__":
    main()
