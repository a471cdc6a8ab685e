"""The hashing embedder compared with MiniLM: chunks of 64 tokens per second, and the usefulness of its neighbours.

    python benchmarks/embed_hashing.py [--chunks 100000] [--rounds 5] [--bytes 1000000] [-o results.json]

Usefulness is measured as retrieval uses neighbours. Modules of the standard library are cut into chunks, and a tenth of
the modules is held out. For each held-out chunk, exact search finds the two nearest values [N, F] of the other modules.
The figure is the mean number of tokens in the longest run that these values share with the chunk's continuation. Random
values give the lower bound. Keys with so many columns that the projection adds almost no noise give the upper bound.
"""

import argparse
import sysconfig
from functools import partial
from pathlib import Path

import retro_np  # imported first, so that BLAS threads sleep as they do in the commands

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
MAX_WIDTH = 2048  # the noise of a cosine is 0.02
MINILM_CHUNKS = 256  # chunks that MiniLM embeds in one turn
QUERIES = 1000


def modules(limit):
    """{name: text} of the standard library's modules, about `limit` characters in all."""
    texts, total = {}, 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if total < limit:
            texts[path.name] = path.read_text(encoding="utf-8", errors="replace")
            total += len(texts[path.name])
    return texts


def chunked(tokenizer, texts):
    """Chunks (N, m) and their continuations (N, m), which are padding at the end of a document."""
    chunks, following = [], []
    for text in texts:
        ids = encode(tokenizer, text)
        rows = np.zeros((-(-len(ids) // M), M), np.int64)
        rows.reshape(-1)[: len(ids)] = ids
        chunks.append(rows)
        following.append(np.concatenate([rows[1:], np.zeros((min(1, len(rows)), M), np.int64)]))
    return np.concatenate(chunks), np.concatenate(following)


def embedder(tokenizer, chunks, d_key):
    """A hashing embedder with feature counts from the chunks."""
    counts = np.zeros(BUCKETS, np.uint32)
    count_features(chunks, counts)
    return HashingEmbedder(tokenizer, counts, len(chunks), d_key)


def hashing(d_key, count, limit):
    """The hashing embedder on `count` chunks, which repeat the chunks of the modules."""
    texts = modules(limit).values()
    tokenizer = train_tokenizer(texts, VOCABULARY)
    chunks, _ = chunked(tokenizer, texts)
    embed, repeated = embedder(tokenizer, chunks, d_key).embed_tokens, np.resize(chunks, (count, M)).astype(np.uint16)
    return lambda: embed(repeated)[:1]


def minilm(count, limit):
    """MiniLM on MINILM_CHUNKS of the chunks."""
    texts = modules(limit).values()
    tokenizer = train_tokenizer(texts, VOCABULARY)
    chunks, _ = chunked(tokenizer, texts)
    sample = np.random.default_rng(0).choice(len(chunks), MINILM_CHUNKS, replace=False)
    decoded, bert = [decode(tokenizer, chunk) for chunk in chunks[sample]], retro_np.load_bert()
    return lambda: bert.embed(decoded, show_progress=False)[:1]


def usefulness(limit):
    """For each embedder, the mean length of the longest run that the values share with the continuation."""
    texts = modules(limit)
    training = [text for name, text in texts.items() if not held_out(name, 0.1)]
    tokenizer = train_tokenizer(training, VOCABULARY)
    chunks, following = chunked(tokenizer, training)
    queries, continuations = chunked(tokenizer, [text for name, text in texts.items() if held_out(name, 0.1)])
    rng = np.random.default_rng(0)
    continued = np.flatnonzero(continuations.any(axis=1))
    sample = np.sort(rng.choice(continued, min(QUERIES, len(continued)), replace=False))
    queries, continuations = queries[sample], continuations[sample]

    def longest_run(ids):
        return longest_common_substring(continuations, np.concatenate([chunks, following], axis=1)[ids]).mean()

    tokens = {"random values": longest_run(rng.integers(0, len(chunks), (len(queries), 2)))}
    for d_key in (*WIDTHS, MAX_WIDTH):
        embed = embedder(tokenizer, chunks, d_key).embed_tokens
        ids, _ = exact_search(embed(queries), embed(chunks), 2)
        tokens[f"hashing, {d_key}"] = longest_run(ids)
    bert = retro_np.load_bert()
    keys, query_keys = (bert.embed([decode(tokenizer, chunk) for chunk in part]) for part in (chunks, queries))
    tokens["MiniLM"] = longest_run(exact_search(query_keys, keys, 2)[0])
    return {"tokens_in_common": tokens, "chunks": len(chunks), "queries": len(queries)}


def main():
    """Print a row for each embedder, and save the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bytes", type=int, default=1_000_000, help="bytes of text; MiniLM needs a minute per million")
    parser.add_argument("-o", "--out", help="write the figures to this JSON file")
    options = parser.parse_args()
    makers = {f"hashing, {d_key}": partial(hashing, d_key) for d_key in WIDTHS} | {"MiniLM": minilm}
    rows = compare(makers, options.rounds, (options.chunks, options.bytes))
    for name, row in rows.items():
        rate = (MINILM_CHUNKS if name == "MiniLM" else options.chunks) / row["seconds"]
        # Peers embed different numbers of chunks, so only their rates can be compared.
        rows[name] = {"seconds": row["seconds"], "chunks_a_second": rate, "peak_mb": row["peak_mb"]}
        print(f"{name:16} {rate:8.0f} chunks/s   peak {row['peak_mb']:.0f} MB")
    figures = usefulness(options.bytes)
    for name, tokens in figures["tokens_in_common"].items():
        print(f"{name:16} {tokens:8.2f} tokens in common with the continuation")
    save(options.out, {"rows": rows, "worth": figures, "machine": machine()})


if __name__ == "__main__":
    main()
