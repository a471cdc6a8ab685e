"""Keys for benchmarks/search.py: real ones from a file, random ones, hashed ones of the Python code at hand.

    python benchmarks/search_keys.py 100000 -o keys.npy

makes the real ones, MiniLM's of so many chunks of Python code, at some 140 a second on two cores.
"""

import argparse
import re
import sysconfig
import zlib
from pathlib import Path

import numpy as np

WIDTH = 384  # of MiniLM's keys
CHUNK = 64  # tokens
BYTES = 170  # of text that a BPE of 4096 cuts into about as many tokens
BUCKETS = 1 << 16  # of hashed bigrams
BLOCK = 4096  # chunks that are made into keys at once


def split(keys, queries, rng):
    """`queries` rows drawn without replacement, and the rows that are left: (held out, others)."""
    order = rng.permutation(len(keys))
    return keys[np.sort(order[:queries])], keys[np.sort(order[queries:])]


def from_file(path):
    """(label, keys) of a .npy file (N, d) float32. Raises SystemExit for anything else."""
    keys = np.load(path)
    if keys.ndim != 2 or keys.dtype != np.float32 or not np.isfinite(keys).all():
        raise SystemExit(f"{path}: {keys.dtype} {keys.shape}; wanted a finite float32 matrix, a row a key")
    return f"keys of {Path(path).name}", keys


def random(count, rng):
    """(label, keys): normal draws of length one, (count, WIDTH) float32."""
    return "random vectors, not real keys", _normalised(rng.standard_normal((count, WIDTH), dtype=np.float32))


def hashed(count, rng):
    """(label, keys) of `count` chunks of the standard library's and the installed packages' Python files.

    A chunk is CHUNK tokens, words and signs. Each of its bigrams is hashed to a bucket, each bucket has a random vector
    of signs, and a key is the normalised sum of its bigrams' vectors: a signed random projection of their counts.
    Where there is too little text the chunks overlap, and the label says by how many tokens.
    """
    tokens = _tokens(count * CHUNK)
    step = min(CHUNK, (len(tokens) - CHUNK) // max(1, count - 1))
    if step < 1:
        raise SystemExit(f"the Python files at hand have {len(tokens)} tokens, too few for {count} chunks of {CHUNK}")
    signs = rng.choice(np.float32([-1, 1]), (BUCKETS, WIDTH))
    buckets = ((tokens[:-1].astype(np.uint64) * 2654435761 + tokens[1:]) % (2**32 - 5) % BUCKETS).astype(np.int32)
    keys = np.empty((count, WIDTH), np.float32)
    for first in range(0, count, BLOCK):
        starts = np.arange(first, min(first + BLOCK, count)) * step
        total = np.zeros((len(starts), WIDTH), np.float32)
        for t in range(CHUNK - 1):
            total += signs[buckets[starts + t]]
        keys[first : first + BLOCK] = _normalised(total)
    overlap = f", overlapping by {CHUNK - step} tokens" if step < CHUNK else ""
    return f"hashed bigrams of Python files, chunks of {CHUNK} tokens{overlap}", keys


def minilm(count):
    """Keys (count, WIDTH) of chunks of BYTES bytes of the same files, by the project's BERT."""
    import retro_np

    chunks = []
    for text in _texts():
        chunks += [text[i : i + BYTES] for i in range(0, len(text) - BYTES, BYTES)]
        if len(chunks) >= count:
            return retro_np.load_bert().embed(chunks[:count])
    raise SystemExit(f"the Python files at hand have {len(chunks)} chunks, not {count}")


def _texts():
    """The standard library's and the installed packages' Python files, one after another."""
    folders = dict.fromkeys(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))
    for path in dict.fromkeys(path for folder in folders for path in sorted(Path(folder).rglob("*.py"))):
        try:
            yield path.read_text(encoding="utf-8", errors="ignore")
        except OSError:
            continue


def _tokens(wanted):
    """The first `wanted` tokens of the files, or all there are, each as its CRC: (n,) uint32."""
    table, parts, found = {}, [], 0
    for text in _texts():
        if found >= wanted:
            break
        words = re.findall(r"\w+|[^\w\s]", text)
        for word in words:
            if word not in table:
                table[word] = zlib.crc32(word.encode("utf-8", "ignore"))
        parts.append(np.fromiter(map(table.__getitem__, words), np.uint32, len(words)))
        found += len(words)
    return np.concatenate(parts)[:wanted]


def _normalised(x):
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def recall(ids, exact):
    """The share of the exact neighbours that were found; ids and exact (N, k)."""
    return float((ids[:, :, None] == exact[:, None, :]).any(axis=1).mean())


def agreement(queries, keys, ours, theirs):
    """The share of equal ids, (N, k) both. Raises SystemExit where others are at other distances, beyond rounding."""

    def distances(ids):
        return ((queries[:, None].astype(np.float64) - keys[ids]) ** 2).sum(axis=2)

    # theirs come of |q|² − 2 q·k + |k|² in float32, which decides no closer than this
    rounding = 1e-5 * ((queries**2).sum(axis=1, keepdims=True) + (keys[ours] ** 2).sum(axis=2))
    if (np.abs(distances(ours) - distances(theirs)) > rounding).any():
        raise SystemExit("the two exact searches found neighbours at different distances")
    return float((ours == theirs).mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="MiniLM's keys of Python code, for benchmarks/search.py --keys.")
    parser.add_argument("count", type=int)
    parser.add_argument("-o", "--out", required=True, help="the .npy file to write")
    options = parser.parse_args()
    np.save(options.out, minilm(options.count))
