"""Keys for benchmarks/search.py: real keys from a file, random keys, and hashed keys of the installed Python files.

    python benchmarks/search_keys.py 100000 -o keys.npy

writes real keys: MiniLM's keys of 100,000 chunks of Python code. Two cores embed about 140 chunks per second.
"""

import argparse
import re
import sysconfig
import zlib
from pathlib import Path

import numpy as np

WIDTH = 384  # columns of MiniLM's keys
CHUNK_TOKENS = 64
CHUNK_CHARACTERS = 170  # about 64 tokens of a BPE with a vocabulary of 4096 tokens
BUCKETS = 1 << 16  # buckets of hashed bigrams
BLOCK_CHUNKS = 4096  # chunks per block of work


def split(keys, queries, rng):
    """Draw `queries` rows without replacement. Returns the drawn and the remaining rows."""
    order = rng.permutation(len(keys))
    return keys[np.sort(order[:queries])], keys[np.sort(order[queries:])]


def from_file(path):
    """(label, keys) of a .npy file (N, d) float32. Raises SystemExit for another shape or type, or NaN or infinity."""
    keys = np.load(path)
    if keys.ndim != 2 or keys.dtype != np.float32:
        raise SystemExit(f"{path}: keys must be a float32 matrix (N, d), not {keys.dtype} {keys.shape}")
    if not np.isfinite(keys).all():
        raise SystemExit(f"{path}: keys must be finite; check the embedder that made them")
    return f"keys of {Path(path).name}", keys


def random(count, rng):
    """(label, keys): random directions, (count, WIDTH) float32."""
    return "random vectors, not real keys", _normalised(rng.standard_normal((count, WIDTH), dtype=np.float32))


def hashed(count, rng):
    """(label, keys) of `count` chunks of the Python files of the standard library and the installed packages.

    A chunk is CHUNK_TOKENS words and punctuation marks. Each bigram is hashed to a bucket, and each bucket has a random
    vector of ±1. A key is the normalised sum of its bigrams' vectors, a random projection of their counts. If there is
    too little text, the chunks overlap, and the label gives the number of shared tokens.
    """
    tokens = _tokens(count * CHUNK_TOKENS)
    step = min(CHUNK_TOKENS, (len(tokens) - CHUNK_TOKENS) // max(1, count - 1))
    if step < 1:
        raise SystemExit(f"the installed Python files have only {len(tokens)} tokens: ask for fewer chunks")
    signs = rng.choice(np.float32([-1, 1]), (BUCKETS, WIDTH))
    buckets = ((tokens[:-1].astype(np.uint64) * 2654435761 + tokens[1:]) % (2**32 - 5) % BUCKETS).astype(np.int32)
    keys = np.empty((count, WIDTH), np.float32)
    for first in range(0, count, BLOCK_CHUNKS):
        starts = np.arange(first, min(first + BLOCK_CHUNKS, count)) * step
        total = np.zeros((len(starts), WIDTH), np.float32)
        for t in range(CHUNK_TOKENS - 1):
            total += signs[buckets[starts + t]]
        keys[first : first + BLOCK_CHUNKS] = _normalised(total)
    overlap = f", overlapping by {CHUNK_TOKENS - step} tokens" if step < CHUNK_TOKENS else ""
    return f"hashed bigrams of Python files, chunks of {CHUNK_TOKENS} tokens{overlap}", keys


def minilm(count):
    """MiniLM's keys (count, WIDTH) of chunks of CHUNK_CHARACTERS characters of the files that `hashed` reads."""
    import retro_np

    chunks = []
    for text in _texts():
        chunks += [text[i : i + CHUNK_CHARACTERS] for i in range(0, len(text) - CHUNK_CHARACTERS, CHUNK_CHARACTERS)]
        if len(chunks) >= count:
            return retro_np.load_bert().embed(chunks[:count])
    raise SystemExit(f"the installed Python files have {len(chunks)} chunks, not {count}")


def _texts():
    """The texts of the Python files of the standard library and the installed packages."""
    folders = dict.fromkeys(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))
    for path in dict.fromkeys(path for folder in folders for path in sorted(Path(folder).rglob("*.py"))):
        try:
            yield path.read_text(encoding="utf-8", errors="ignore")
        except OSError:
            continue


def _tokens(max_tokens):
    """The first `max_tokens` tokens of the files, or all if there are fewer, each as its CRC: (n,) uint32."""
    table, parts, total = {}, [], 0
    for text in _texts():
        if total >= max_tokens:
            break
        words = re.findall(r"\w+|[^\w\s]", text)
        table |= {word: zlib.crc32(word.encode("utf-8", "ignore")) for word in set(words) - table.keys()}
        parts.append(np.fromiter(map(table.__getitem__, words), np.uint32, len(words)))
        total += len(words)
    return np.concatenate(parts)[:max_tokens]


def _normalised(x):
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def recall(ids, exact):
    """The share of the exact neighbours that were found. ids, exact: (N, k)."""
    return float((ids[:, :, None] == exact[:, None, :]).any(axis=1).mean())


def agreement(queries, keys, ids, peer_ids):
    """The share of positions at which ids and peer_ids, (N, k) each, agree.

    Raises SystemExit if their distances differ by more than rounding.
    """

    def distances(rows):
        return ((queries[:, None].astype(np.float64) - keys[rows]) ** 2).sum(axis=2)

    # the peer computes |q|² − 2 q·k + |k|² in float32, with this rounding error
    rounding = 1e-5 * ((queries**2).sum(axis=1, keepdims=True) + (keys[ids] ** 2).sum(axis=2))
    if (np.abs(distances(ids) - distances(peer_ids)) > rounding).any():
        raise SystemExit("the two exact searches found neighbours at different distances")
    return float((ids == peer_ids).mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="MiniLM's keys of Python code, for benchmarks/search.py --keys.")
    parser.add_argument("count", type=int)
    parser.add_argument("-o", "--out", required=True, help="the .npy file to write")
    options = parser.parse_args()
    np.save(options.out, minilm(options.count))
