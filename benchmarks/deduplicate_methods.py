"""From which size on is MinHash better than comparing all pairs exactly? Time and memory of both in a build's stage.

    python benchmarks/deduplicate_methods.py [--held 1 8 32] [--rounds 5] [-o results.json]

A build compares each text shard with the held-out documents (`retro_np.retrieval.shards.compare_shard`). The text shard
here has 32 MB, as by default. Both sides are Python files of the standard library and of the installed packages, each
used once, in a random order. The two methods run in turns, each in its own process. At the threshold 0.8 they must find
the same number of documents. At 0.1 MinHash would miss nearly all, so only the exact method runs.

A build uses MinHash wherever its bands detect the threshold (`deduplicate.SURE_DETECTION`), since it is faster here.
"""

import argparse
import json
import sysconfig
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from turns import compare, machine, save

from retro_np.retrieval.deduplicate import DedupConfig
from retro_np.retrieval.shards import compare_shard, sign_shard
from retro_np.retrieval.texts import Text, read_texts

SHARD_BYTES, MIN_BYTES, MAX_BYTES, SEED = 32_000_000, 500, 200_000, 0
THRESHOLDS = (0.8, 0.1)


def shards_of(folder, paths, total):
    """Write text shards of SHARD_BYTES with the next files, together about `total` bytes. Returns their paths."""
    shards, size = [], 0
    while size < total:
        shards.append(folder / f"{len(shards):05d}.jsonl")
        texts, shard_size = [], 0
        while shard_size < min(SHARD_BYTES, total - size):
            text = next(paths).read_text(encoding="utf-8", errors="ignore")
            texts.append(Text(len(texts), f"{len(shards)}/{len(texts)}", "python", 0, text))
            shard_size += len(text.encode())
        shards[-1].write_text("".join(json.dumps(text) + "\n" for text in texts))
        size += shard_size
    return shards


def prepared(texts, held, signed, config, exact, out):
    """A function that compares a text shard, and returns the numbers of the duplicates."""

    def work():
        compare_shard(texts, out, held, signed, config, exact)
        return out.read_text().count("\n")

    return work


def measure(folder, texts, held, rounds):
    """A row for each threshold."""
    rows = []
    for threshold in THRESHOLDS:
        config, makers, seconds = DedupConfig(threshold=threshold), {}, {}
        for name, exact in {"exact": True, "minhash": False}.items():
            if not exact and config.compares_exactly:
                continue
            start = time.perf_counter()
            signed = [folder / f"{path.stem}.{name}.npy" for path in held]
            for path, out in zip(held, signed, strict=True):
                sign_shard(path, out, config, exact)
            seconds[name] = time.perf_counter() - start
            makers[name] = partial(prepared, texts, held, signed, config, exact, folder / f"{name}.jsonl")
        compared = compare(makers, rounds, same=lambda a, b: a == b)
        rows.append({"threshold": threshold, "compare": compared, "sign_seconds": seconds})
    return rows


def main():
    """Print a row for each size and threshold, and save the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--held", type=float, nargs="+", default=[1, 8, 32], help="MB of held-out text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--out", help="write the figures to this JSON file")
    options = parser.parse_args()
    folders = dict.fromkeys(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))
    paths = dict.fromkeys(path for folder in folders for path in sorted(Path(folder).rglob("*.py")))
    fitting = [path for path in paths if path.is_file() and MIN_BYTES <= path.stat().st_size <= MAX_BYTES]
    order = iter([fitting[i] for i in np.random.default_rng(SEED).permutation(len(fitting))])
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / "train").mkdir()
        (texts,) = shards_of(Path(temporary) / "train", order, SHARD_BYTES)
        count = sum(1 for _ in read_texts(texts))
        rest = list(order)
        for megabytes in options.held:
            folder = Path(temporary) / str(megabytes)
            folder.mkdir()
            held = shards_of(folder, iter(rest), megabytes * 1e6)
            for row in measure(folder, texts, held, options.rounds):
                results.append({"held_megabytes": megabytes} | row)
                for name, figures in row["compare"].items():
                    print(
                        f"{megabytes:g} MB, threshold {row['threshold']}, {name}: {figures['seconds']:.2f} s,"
                        f" {figures['times_ours']:.2f} of exact, {figures['peak_mb']:.0f} MB;"
                        f" signing {row['sign_seconds'][name]:.1f} s",
                        flush=True,
                    )
    save(options.out, {"texts": count, "shard_bytes": SHARD_BYTES, "sizes": results, "machine": machine()})


if __name__ == "__main__":
    main()
