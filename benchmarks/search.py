"""Compare exact search with faiss's IndexFlatL2, and HNSW by hnswlib with faiss's HNSW and with ScaNN.

    python benchmarks/search.py [--keys FILE.npy] [--sizes 10000 100000] [--hashed 1000000] [-o results.json]

Without --keys the keys are random vectors, and the output says so. Queries are rows held out of the keys.

Exact search is timed for a batch of queries and for single queries, both on all cores. The ids are compared first. The
peers take turns for several rounds. A ratio compares times of the same round, and the median of the ratios is printed.
For approximate search the figures are recall@2 relative to exact search, and the latency of single queries on one
thread (median and 95th percentile). They are given for each setting, which is ef for graphs and the number of leaves
for ScaNN. `pip install faiss-cpu scann` installs the peers; a peer that is not installed is skipped, with a message.

Each peer runs in its own process with its default threading. Only faiss's number of threads is set, and retro_np lets
its BLAS threads sleep, as it always does when it is imported first. In a shared process, the threads of OpenMP and BLAS
would spin during another peer's turn. Threads may spin for a moment after their own peer's turn, so each turn begins
with a pause.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import search_peers
from turns import machine, save

SEED, PAUSE = 0, 0.1
EF = (10, 20, 40, 66, 100, 200, 400)  # retro_np/retrieval/index.py uses 66 for two neighbours
LEAVES = (1, 2, 5, 10, 20, 50, 100, 200)
EXACT = {"retro_np": search_peers.exact_retro_np, "faiss IndexFlatL2": search_peers.exact_faiss}
APPROXIMATE = {
    "hnswlib": (search_peers.hnsw_hnswlib, EF),
    "faiss HNSW": (search_peers.hnsw_faiss, EF),
    "ScaNN": (search_peers.scann, LEAVES),
}
NEEDS = {"faiss IndexFlatL2": "faiss", "faiss HNSW": "faiss", "ScaNN": "scann"}


@contextlib.contextmanager
def peers(makers, files):
    """Start one process per peer; yield a function turn(name, command, argument) that returns the peer's answer."""
    context, pipes = multiprocessing.get_context("spawn"), {}
    for name, make in makers.items():
        pipes[name], child_end = context.Pipe()
        context.Process(target=search_peers.serve, args=(make, files, child_end), daemon=True).start()
        child_end.close()
    for name, pipe in list(pipes.items()):
        try:
            pipe.recv()
        except EOFError:  # its traceback has been printed
            print(f"{name} failed to start and is skipped")
            del pipes[name]

    def turn(name, command, argument=None):
        time.sleep(PAUSE)
        pipes[name].send((command, argument))
        return pipes[name].recv()

    turn.names = list(pipes)
    try:
        yield turn
    finally:
        for pipe in pipes.values():
            with contextlib.suppress(OSError):
                pipe.send(None)


def installed(makers):
    """The peers whose library is installed. Prints a line for each of the others."""
    missing = [name for name in makers if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None]
    for name in missing:
        print(f"{name} is not installed (pip install faiss-cpu scann) and is skipped")
    return {name: make for name, make in makers.items() if name not in missing}


def compare_exact(files, rounds, singles, check):
    """Figures of exact search, and the exact ids. check(ids, peer_ids) returns the share of equal ids."""
    rows = {}
    with peers(installed(EXACT), files) as turn:
        ids = {name: turn(name, "batch")[1] for name in turn.names}
        equal = {name: check(ids["retro_np"], peer_ids) for name, peer_ids in ids.items()}
        times = {name: {"batch": [], "single": []} for name in turn.names}
        for name in turn.names:
            turn(name, "single", 3)
        for _ in range(rounds):
            for name in turn.names:
                times[name]["batch"].append(turn(name, "batch")[0])
            for name in turn.names:
                times[name]["single"].append(statistics.median(turn(name, "single", singles)))
    for name, modes in times.items():
        rows[name] = {"equal_ids": equal[name]}
        for mode, seconds in modes.items():
            ratios = sorted(a / b for a, b in zip(seconds, times["retro_np"][mode], strict=True))
            median, ratio = statistics.median(seconds), statistics.median(ratios)
            rows[name][mode] = {"seconds": median, "times_ours": ratio, "from": ratios[0], "to": ratios[-1]}
            print(
                f"  {name:18} {mode:7} {1e3 * median:9.2f} ms   {ratio:6.2f} × retro_np "
                f"({ratios[0]:.2f} … {ratios[-1]:.2f})   {equal[name]:.2%} equal ids"
            )
    return rows, ids["retro_np"]


def compare_approximate(files, rounds, threads, recall):
    """Figures of approximate search. recall(ids) returns the share of the exact neighbours that were found."""
    rows, makers = {}, installed(APPROXIMATE)
    with peers({name: make for name, (make, _) in makers.items()}, files) as turn:
        for name in turn.names:
            rows[name] = {"build_seconds": turn(name, "build", threads), "build_threads": threads, "settings": []}
            print(f"  {name:18} built in {rows[name]['build_seconds']:.1f} s, threads: {threads}")
        for step in range(max(len(settings) for _, settings in makers.values())):
            settings = {name: makers[name][1][step] for name in turn.names if step < len(makers[name][1])}
            answers = [{name: turn(name, "search", value) for name, value in settings.items()} for _ in range(rounds)]
            for name, setting in settings.items():
                medians = [statistics.median(answer[name][1]) for answer in answers]
                row = {"setting": setting, "recall": recall(answers[0][name][0])}
                row |= {"median": statistics.median(medians), "from": min(medians), "to": max(medians)}
                row["p95"] = statistics.median(statistics.quantiles(answer[name][1], n=20)[-1] for answer in answers)
                rows[name]["settings"].append(row)
    for name, row in rows.items():
        for point in row["settings"]:
            print(
                f"  {name:18} {point['setting']:5}   recall@{search_peers.K} {point['recall']:.4f}"
                f"   {1e6 * point['median']:7.0f} µs, 95th percentile {1e6 * point['p95']:7.0f} µs"
            )
        for goal in (0.95, 0.99):
            sufficient = [point for point in row["settings"] if point["recall"] >= goal]
            best = min(sufficient, key=lambda point: point["median"], default=None)
            row[f"at_recall_{goal}"] = best
            print(f"  {name:18} recall ≥ {goal}: " + (f"{1e6 * best['median']:.0f} µs" if best else "not reached"))
    return rows


def measure(label, held_out, keys, options):
    """All figures for one set of keys."""
    import numpy as np
    import search_keys

    print(f"\n{len(keys)} keys of width {keys.shape[1]}: {label}; {len(held_out)} held-out queries")
    result = {"keys": label, "size": len(keys), "width": keys.shape[1], "queries": len(held_out)}
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / name) for name in ("keys.npy", "queries.npy")]
        np.save(files[0], keys)
        np.save(files[1], held_out)
        result["exact"], exact = compare_exact(
            files, options.rounds, options.singles, lambda a, b: search_keys.agreement(held_out, keys, a, b)
        )
        if not options.exact_only:
            result["approximate"] = compare_approximate(
                files, min(3, options.rounds), options.build_threads, lambda ids: search_keys.recall(ids, exact)
            )
    return result


def main():
    """Print a table for each set of keys, and save the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", help="real keys: .npy, (N, d) float32")
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=[10_000, 100_000], help="numbers of keys, with one table for each"
    )
    parser.add_argument("--hashed", type=int, help="also measure this many hashed keys of the installed Python files")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--singles", type=int, default=20, help="single queries in each turn of exact search")
    parser.add_argument("--build-threads", type=int, default=1, help="1, as in retro_np, gives reproducible graphs")
    parser.add_argument("--exact-only", action="store_true")
    parser.add_argument("-o", "--out", help="write the figures to this JSON file")
    options = parser.parse_args()
    import numpy as np  # not at the top, see search_peers.py
    import search_keys

    results = {"machine": machine(), "tables": []}
    sizes = sorted(options.sizes)
    if sizes:
        rng = np.random.default_rng(SEED)
        count = options.queries + max(sizes)
        label, keys = search_keys.from_file(options.keys) if options.keys else search_keys.random(count, rng)
        held_out, keys = search_keys.split(keys, options.queries, rng)
        for size in sizes:
            if size > len(keys):
                print(f"\nskipped {size} keys: only {len(keys)} remain after the queries are held out")
                continue
            subset = keys[np.sort(rng.permutation(len(keys))[:size])]
            results["tables"].append(measure(label, held_out, subset, options))
    if options.hashed:
        rng = np.random.default_rng(SEED)
        label, keys = search_keys.hashed(options.hashed + options.queries, rng)
        results["tables"].append(measure(label, *search_keys.split(keys, options.queries, rng), options))
    save(options.out, results)


if __name__ == "__main__":
    main()
