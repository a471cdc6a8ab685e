"""Near-duplicates by MinHash against the exact similarity of all pairs: recall, precision, error, speed.

    python benchmarks/deduplicate.py [--documents 3000] [-o results.json]

The documents are Python files of the standard library, its tests among them, and of the installed packages, of 500 to
200,000 bytes, each fifth held out. To the others come near-duplicates of held-out ones, made by replacing words,
dropping and doubling lines and cutting off the end, at rates that spread the similarities over 0.5 to 1. The truth is
the exact Jaccard similarity of every training document with every held-out one, counted by an inverted index of grams.

For each setting, bands × hashes of a band: (a) the estimate alone, a pair counted where its share of equal hashes
reaches the threshold, over all pairs; (b) agreement in a band, then the exact similarity, over all pairs; and the
documents that `find_duplicates` drops against those that should be dropped. Speed is the best of several rounds.
"""

import argparse
import itertools
import re
import sysconfig
import time
from pathlib import Path

import numpy as np
from turns import machine, save

from retro_np.kernels import threads
from retro_np.retrieval.deduplicate import (
    DedupConfig,
    band_index,
    candidates,
    caught,
    find_duplicates,
    grams,
    jaccard,
    signatures,
)

SETTINGS = ((32, 4), (16, 8), (25, 5))
SHORTEST, LONGEST, SEED = 500, 200_000, 0
SIZES = (0.0, 0.5, 0.7, 0.75, 0.8, 0.85, 0.9, 1.0)  # bounds of the classes of similarity in which pairs are counted


def documents(count, rng):
    """A sample of the Python files at hand, no text twice."""
    folders = dict.fromkeys(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))
    paths = dict.fromkeys(path for folder in folders for path in sorted(Path(folder).rglob("*.py")))
    fitting = [path for path in paths if path.is_file() and SHORTEST <= path.stat().st_size <= LONGEST]
    chosen = rng.permutation(len(fitting))[:count]
    return list(dict.fromkeys(fitting[i].read_text(encoding="utf-8", errors="ignore") for i in chosen))


def edited(text, rng):
    """A near-duplicate: words replaced, lines dropped or doubled, or the end cut off, at a rate of its own."""
    way, rate = rng.integers(4), rng.uniform(0, 1) ** 2
    if way == 0:
        pieces = re.split(r"(\w+)", text)  # words stand at the odd places
        change = rng.random(len(pieces)) < 0.06 * rate
        return "".join(f"x{i}" if change[i] and i % 2 else piece for i, piece in enumerate(pieces))
    lines = text.splitlines(keepends=True)
    if way == 3:
        return "".join(lines[: round(len(lines) * (1 - 0.5 * rate))])
    change = rng.random(len(lines)) < 0.2 * rate
    return "".join(line * (2 if way == 1 else 0) if change[i] else line for i, line in enumerate(lines))


def all_similarities(texts, held, words):
    """The exact Jaccard similarities, (N, H) float32, by an inverted index of the training documents' grams."""
    sets, held_sets = grams(texts, words), grams(held, words)
    every, owner = np.concatenate(sets), np.repeat(np.arange(len(sets)), [len(some) for some in sets])
    order = np.argsort(every, kind="stable")
    every, owner = every[order], owner[order]
    exact, sizes = np.zeros((len(texts), len(held)), np.float32), np.array([len(some) for some in sets])
    for j, own in enumerate(held_sets):
        low, high = np.searchsorted(every, own, side="left"), np.searchsorted(every, own, side="right")
        counts = high - low
        places = np.repeat(high - np.cumsum(counts), counts) + np.arange(counts.sum())
        common = np.bincount(owner[places], minlength=len(texts))
        exact[:, j] = common / np.maximum(1, sizes + len(own) - common)
    return exact


def all_estimates(marks, held_marks):
    """The share of equal hashes of every pair, (N, H) float32."""
    return np.stack([(marks == own).mean(axis=1, dtype=np.float32) for own in held_marks], axis=1)


def banded_pairs(marks, held_marks, config, shape):
    """Which pairs are candidates, (N, H) bool, those of equal signatures among them."""
    index, there = band_index(held_marks, config), np.zeros(shape, bool)
    i, j, _ = candidates(marks, index, config, limit=shape[1])
    for row, held in zip(i, j, strict=True):
        there[row, index.alike(held)] = True
    return there


def share(part, whole):
    """Of recall and precision; 1 where there was nothing to find."""
    return float(part / whole) if whole else 1.0


def measure(texts, held, exact, config):
    """The figures of one setting."""
    marks, held_marks = signatures(texts, config), signatures(held, config)
    estimates, true = all_estimates(marks, held_marks), exact >= config.threshold
    guessed = estimates >= config.threshold
    near = banded_pairs(marks, held_marks, config, exact.shape)
    kept = np.zeros_like(near)
    for i, j in zip(*np.nonzero(near), strict=True):
        kept[i, j] = jaccard(texts[i], held[j], config.words) >= config.threshold
    began = time.perf_counter()
    index = band_index(held_marks, config)
    found = find_duplicates(texts, index, held.__getitem__, config)
    seconds = time.perf_counter() - began
    rows, wanted = {record.row for record in found}, set(np.flatnonzero(true.any(axis=1)).tolist())
    alike = exact >= 0.5
    errors = np.abs(estimates - exact)[alike]
    classes = {}
    for low, high in itertools.pairwise(SIZES):
        of_class = (exact >= low) & ((exact < high) | (high == 1)) & (exact > 0)
        some = estimates[of_class]
        classes[f"{low:.2f} to {high:.2f}"] = {
            "pairs": int(of_class.sum()),
            "candidates": int((near & of_class).sum()),
            "estimate_reaches_threshold": int((some >= config.threshold).sum()),
        }
    return {
        "setting": f"{config.bands} × {config.hashes // config.bands}",
        "in_a_band_at_threshold": caught(config.threshold, config),
        "pairs_at_threshold": int(true.sum()),
        "estimate_alone": {
            "recall": share((guessed & true).sum(), true.sum()),
            "precision": share((guessed & true).sum(), guessed.sum()),
        },
        "bands_and_exact": {
            "recall": share((kept & true).sum(), true.sum()),
            "precision": share((kept & true).sum(), kept.sum()),
        },
        "documents": {
            "to_drop": len(wanted),
            "recall": share(len(rows & wanted), len(wanted)),
            "precision": share(len(rows & wanted), len(rows)),
        },
        "candidate_pairs": int(near.sum()),
        "mean_absolute_error": float(errors.mean()),
        "find_seconds": seconds,
        "classes": classes,
    }


def speeds(texts, config, rounds):
    """MB of UTF-8 a second that `signatures` takes in, by number of threads: many files, and one long text."""
    figures, one = {}, ["".join(texts)]
    megabytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts) / 1e6
    before = threads.count()
    for count in sorted({1, threads.cores()}):
        threads.use_threads(count)
        best = {"files": 0.0, "one_text": 0.0}
        for _ in range(rounds + 1):  # the first one compiles
            for what, some in (("files", texts), ("one_text", one)):
                began = time.perf_counter()
                signatures(some, config)
                best[what] = max(best[what], megabytes / (time.perf_counter() - began))
        figures[str(count)] = best
    threads.use_threads(before)
    return figures | {"megabytes": megabytes}


def main():
    """Print the tables and save them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=3000)
    parser.add_argument("--planted", type=int, default=4, help="near-duplicates of each held-out document")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--out", help="write the figures as JSON")
    options = parser.parse_args()
    rng = np.random.default_rng(SEED)
    real = documents(options.documents, rng)
    held, texts = real[::5], [text for i, text in enumerate(real) if i % 5]
    texts += [edited(text, rng) for text in held for _ in range(options.planted)]
    began = time.perf_counter()
    exact = all_similarities(texts, held, DedupConfig().words)
    took = time.perf_counter() - began
    print(
        f"{len(texts)} training documents × {len(held)} held out: {exact.size:,} pairs, {(exact > 0).sum():,} share a"
    )
    print(f"gram, {(exact >= 0.5).sum():,} have a similarity of 0.5 or more; exactly, in {took:.1f} s")
    rows = []
    for bands, width in SETTINGS:
        row = measure(texts, held, exact, DedupConfig(hashes=bands * width, bands=bands))
        rows.append(row)
        estimate, both, dropped = row["estimate_alone"], row["bands_and_exact"], row["documents"]
        print(
            f"  {row['setting']:6}  estimate alone: recall {estimate['recall']:.4f}, precision"
            f" {estimate['precision']:.4f}   bands and exact: recall {both['recall']:.4f}, precision"
            f" {both['precision']:.4f}   documents: recall {dropped['recall']:.4f} of {dropped['to_drop']}, precision"
            f" {dropped['precision']:.4f}\n          {row['candidate_pairs']} candidates for"
            f" {row['pairs_at_threshold']} pairs, mean error of the estimate {row['mean_absolute_error']:.4f},"
            f" found in {row['find_seconds']:.2f} s"
        )
    for name, some in rows[0]["classes"].items():
        print(
            f"    similarity {name}: {some['pairs']:7} pairs, {some['candidates']:6} candidates of {rows[0]['setting']}"
        )
    speed = speeds(texts, DedupConfig(), options.rounds)
    for count in sorted({1, threads.cores()}):
        best = speed[str(count)]
        print(f"  {count} threads: {best['files']:.0f} MB/s of files, {best['one_text']:.0f} MB/s of one text")
    counts = {
        "training": len(texts),
        "held_out": len(held),
        "pairs": exact.size,
        "planted": options.planted * len(held),
    }
    counts |= {"share_a_gram": int((exact > 0).sum()), "at_least_half": int((exact >= 0.5).sum())}
    save(options.out, {"documents": counts, "settings": rows, "speed": speed, "machine": machine()})


if __name__ == "__main__":
    main()
