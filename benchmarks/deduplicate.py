"""Compare near-duplicates found by MinHash with the exact similarity of all pairs: recall, precision, error, speed.

    python benchmarks/deduplicate.py [--documents 3000] [-o results.json]

The documents are Python files of the standard library (with its tests) and of the installed packages, of 500 to 200,000
bytes. Every fifth is held out. The training documents are the remaining ones and near-duplicates of held-out documents.
These have words replaced, lines dropped or doubled, or the end truncated, so that similarities range from 0.5 to 1. The
ground truth is the exact Jaccard similarity of every training document with every held-out one, from an inverted index
of grams.

For each setting (bands × hashes per band) recall and precision are computed for three things: the pairs whose estimate
reaches the threshold; the pairs that agree in a band and whose exact similarity reaches it; and the documents that
`find_duplicates` drops. Speeds are the best of several rounds.
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
    detection_probability,
    find_duplicates,
    grams,
    jaccard,
    signatures,
)

SETTINGS = ((32, 4), (16, 8), (25, 5))
MIN_BYTES, MAX_BYTES, SEED = 500, 200_000, 0
BOUNDS = (0.0, 0.5, 0.7, 0.75, 0.8, 0.85, 0.9, 1.0)  # bounds of the similarity classes in which pairs are counted


def documents(count, rng):
    """A sample of the installed Python files, without repeated texts."""
    folders = dict.fromkeys(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))
    paths = dict.fromkeys(path for folder in folders for path in sorted(Path(folder).rglob("*.py")))
    fitting = [path for path in paths if path.is_file() and MIN_BYTES <= path.stat().st_size <= MAX_BYTES]
    chosen = rng.permutation(len(fitting))[:count]
    return list(dict.fromkeys(fitting[i].read_text(encoding="utf-8", errors="ignore") for i in chosen))


def edited(text, rng):
    """A near-duplicate: words replaced, lines dropped or doubled, or the end truncated, at a random rate."""
    kind, rate = rng.integers(4), rng.uniform(0, 1) ** 2
    if kind == 0:
        pieces = re.split(r"(\w+)", text)  # words have odd indices
        change = rng.random(len(pieces)) < 0.06 * rate
        return "".join(f"x{i}" if change[i] and i % 2 else piece for i, piece in enumerate(pieces))
    lines = text.splitlines(keepends=True)
    if kind == 3:
        return "".join(lines[: round(len(lines) * (1 - 0.5 * rate))])
    change = rng.random(len(lines)) < 0.2 * rate
    return "".join(line * (2 if kind == 1 else 0) if change[i] else line for i, line in enumerate(lines))


def all_similarities(texts, held_out, words):
    """The exact Jaccard similarities, (N, H) float32, from an inverted index of the training documents' grams."""
    sets = grams(texts, words)
    sizes = np.array([len(gram_set) for gram_set in sets])
    hashes, owners = np.concatenate(sets), np.repeat(np.arange(len(sets)), sizes)
    order = np.argsort(hashes, kind="stable")
    hashes, owners = hashes[order], owners[order]
    exact = np.zeros((len(texts), len(held_out)), np.float32)
    for j, held_set in enumerate(grams(held_out, words)):
        low, high = np.searchsorted(hashes, held_set, side="left"), np.searchsorted(hashes, held_set, side="right")
        counts = high - low
        positions = np.repeat(high - np.cumsum(counts), counts) + np.arange(counts.sum())
        common = np.bincount(owners[positions], minlength=len(texts))
        exact[:, j] = common / np.maximum(1, sizes + len(held_set) - common)
    return exact


def all_estimates(training, held_out):
    """The share of equal hashes of every pair of signatures, (N, H) float32."""
    return np.stack([(training == signature).mean(axis=1, dtype=np.float32) for signature in held_out], axis=1)


def banded_pairs(training, held_out, config, shape):
    """Which pairs are candidates, (N, H) bool. Held-out documents with equal signatures all count."""
    index, pairs = band_index(held_out, config), np.zeros(shape, bool)
    for row, near, _ in candidates(training, index):
        pairs[row, [held_row for signature in near for held_row in index.members[signature]]] = True
    return pairs


def share(part, total):
    """Recall or precision: part / total, or 1 if there was nothing to find."""
    return float(part / total) if total else 1.0


def measure(texts, held_out, exact, config):
    """The figures of one setting."""
    training_signatures, held_signatures = signatures(texts, config), signatures(held_out, config)
    estimates, true = all_estimates(training_signatures, held_signatures), exact >= config.threshold
    estimated = estimates >= config.threshold
    candidate = banded_pairs(training_signatures, held_signatures, config, exact.shape)
    confirmed = np.zeros_like(candidate)
    for i, j in zip(*np.nonzero(candidate), strict=True):
        confirmed[i, j] = jaccard(texts[i], held_out[j], config.words) >= config.threshold
    start = time.perf_counter()
    index = band_index(held_signatures, config)
    duplicates = find_duplicates(texts, index, held_out.__getitem__)
    seconds = time.perf_counter() - start
    dropped, expected = {record.row for record in duplicates}, set(np.flatnonzero(true.any(axis=1)).tolist())
    errors = np.abs(estimates - exact)[exact >= 0.5]
    classes = {}
    for low, high in itertools.pairwise(BOUNDS):
        in_class = (exact >= low) & ((exact < high) | (high == 1)) & (exact > 0)
        classes[f"{low:.2f} to {high:.2f}"] = {
            "pairs": int(in_class.sum()),
            "candidates": int((candidate & in_class).sum()),
            "estimate_reaches_threshold": int((estimated & in_class).sum()),
        }
    return {
        "setting": f"{config.bands} × {config.hashes // config.bands}",
        "in_a_band_at_threshold": detection_probability(config.threshold, config),
        "pairs_at_threshold": int(true.sum()),
        "estimate_alone": {
            "recall": share((estimated & true).sum(), true.sum()),
            "precision": share((estimated & true).sum(), estimated.sum()),
        },
        "bands_and_exact": {
            "recall": share((confirmed & true).sum(), true.sum()),
            "precision": share((confirmed & true).sum(), confirmed.sum()),
        },
        "documents": {
            "to_drop": len(expected),
            "recall": share(len(dropped & expected), len(expected)),
            "precision": share(len(dropped & expected), len(dropped)),
        },
        "candidate_pairs": int(candidate.sum()),
        "mean_absolute_error": float(errors.mean()),
        "find_seconds": seconds,
        "classes": classes,
    }


def speeds(texts, config, rounds):
    """MB of UTF-8 per second that `signatures` processes, by number of threads, for many files and for one text."""
    figures, joined = {}, ["".join(texts)]
    megabytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts) / 1e6
    initial_threads = threads.count()
    for count in sorted({1, threads.cores()}):
        threads.use_threads(count)
        best = {"files": 0.0, "one_text": 0.0}
        for _ in range(rounds + 1):  # the first round compiles
            for name, batch in (("files", texts), ("one_text", joined)):
                start = time.perf_counter()
                signatures(batch, config)
                best[name] = max(best[name], megabytes / (time.perf_counter() - start))
        figures[str(count)] = best
    threads.use_threads(initial_threads)
    return figures | {"megabytes": megabytes}


def main():
    """Print the tables, and save the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=3000)
    parser.add_argument("--planted", type=int, default=4, help="near-duplicates per held-out document")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--out", help="write the figures to this JSON file")
    options = parser.parse_args()
    rng = np.random.default_rng(SEED)
    real = documents(options.documents, rng)
    held_out, texts = real[::5], [text for i, text in enumerate(real) if i % 5]
    texts += [edited(text, rng) for text in held_out for _ in range(options.planted)]
    start = time.perf_counter()
    exact = all_similarities(texts, held_out, DedupConfig().words)
    seconds = time.perf_counter() - start
    print(f"{len(texts)} training documents × {len(held_out)} held out = {exact.size:,} pairs in {seconds:.1f} s.")
    print(f"{(exact > 0).sum():,} pairs share a gram. {(exact >= 0.5).sum():,} have a similarity of at least 0.5.")
    rows = []
    for bands, width in SETTINGS:
        row = measure(texts, held_out, exact, DedupConfig(hashes=bands * width, bands=bands))
        rows.append(row)
        estimate, banded, dropped = row["estimate_alone"], row["bands_and_exact"], row["documents"]
        print(
            f"  {row['setting']:6}  estimate: recall {estimate['recall']:.4f}, precision"
            f" {estimate['precision']:.4f}   bands and exact: recall {banded['recall']:.4f}, precision"
            f" {banded['precision']:.4f}   documents: recall {dropped['recall']:.4f} of {dropped['to_drop']}, precision"
            f" {dropped['precision']:.4f}\n          {row['candidate_pairs']} candidates for"
            f" {row['pairs_at_threshold']} pairs, mean error of the estimate {row['mean_absolute_error']:.4f},"
            f" {row['find_seconds']:.2f} s"
        )
    for name, counts in rows[0]["classes"].items():
        print(f"    similarity {name}: {counts['pairs']:7} pairs, {counts['candidates']:6} candidates")
    speed = speeds(texts, DedupConfig(), options.rounds)
    for count in sorted({1, threads.cores()}):
        best = speed[str(count)]
        print(f"  {count} threads: {best['files']:.0f} MB/s for files, {best['one_text']:.0f} MB/s for one text")
    counts = {
        "training": len(texts),
        "held_out": len(held_out),
        "pairs": exact.size,
        "planted": options.planted * len(held_out),
    }
    counts |= {"share_a_gram": int((exact > 0).sum()), "at_least_half": int((exact >= 0.5).sum())}
    save(options.out, {"documents": counts, "settings": rows, "speed": speed, "machine": machine()})


if __name__ == "__main__":
    main()
