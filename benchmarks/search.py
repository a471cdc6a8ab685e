"""Exact search against faiss IndexFlatL2, and HNSW by hnswlib against faiss's and ScaNN, as ratios and as curves.

    python benchmarks/search.py [--keys FILE.npy] [--sizes 10000 100000] [--hashed 1000000] [-o results.json]

Without --keys the keys are random vectors, and the output says so. Queries are rows held out of the keys.

Exact: a batch of queries, and queries one at a time, both with all cores. The ids are compared first. The searches take
turns, several rounds; a ratio is of one round, and the median of the ratios is printed.
HNSW: recall@2 against exact search and the latency of a query on one thread, median and 95th percentile, for each
setting: ef of the graphs, leaves searched of ScaNN. pip install faiss-cpu scann; what is not there is left out, in a
line.

Each peer is a process of its own with the threads and the waiting that it has by default: nothing is set for faiss but
the number of its threads, and retro_np lets its BLAS threads sleep, as it does for everyone who imports it first. In
one process the threads of OpenMP and of either BLAS would spin on the cores while another has its turn; here they may
do so for a moment after theirs, so a turn begins with a pause.
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
EF = (10, 20, 40, 66, 100, 200, 400)  # 66 is what retro_np/retrieval/index.py takes for two neighbours
LEAVES = (1, 2, 5, 10, 20, 50, 100, 200)
EXACT = {"retro_np": search_peers.exact_ours, "faiss IndexFlatL2": search_peers.exact_faiss}
APPROXIMATE = {
    "hnswlib": (search_peers.hnsw_ours, EF),
    "faiss HNSW": (search_peers.hnsw_faiss, EF),
    "ScaNN": (search_peers.scann, LEAVES),
}
NEEDS = {"faiss IndexFlatL2": "faiss", "faiss HNSW": "faiss", "ScaNN": "scann"}


@contextlib.contextmanager
def peers(makers, files):
    """Start a process a peer; yield a function that gives one its turn: turn(name, command, argument) -> answer."""
    context, pipes = multiprocessing.get_context("spawn"), {}
    for name, make in makers.items():
        pipes[name], theirs = context.Pipe()
        context.Process(target=search_peers.serve, args=(make, files, theirs), daemon=True).start()
        theirs.close()
    for name, pipe in list(pipes.items()):
        try:
            pipe.recv()
        except EOFError:  # its traceback has been printed
            print(f"{name} failed to start, and is left out")
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


def there(makers):
    """Those whose library is installed; a line for each of the others."""
    missing = [name for name in makers if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None]
    for name in missing:
        print(f"{name} is not installed (pip install faiss-cpu scann), and is left out")
    return {name: made for name, made in makers.items() if name not in missing}


def compare_exact(files, rounds, singles, check):
    """Rows of (a) and the exact ids. check(ours, theirs) -> the share of equal ids."""
    rows = {}
    with peers(there(EXACT), files) as turn:
        ids = {name: turn(name, "batch")[1] for name in turn.names}
        equal = {name: check(ids["retro_np"], found) for name, found in ids.items()}
        taken = {name: {"batch": [], "single": []} for name in turn.names}
        for name in turn.names:
            turn(name, "single", 3)
        for _ in range(rounds):
            for name in turn.names:
                taken[name]["batch"].append(turn(name, "batch")[0])
            for name in turn.names:
                taken[name]["single"].append(statistics.median(turn(name, "single", singles)))
    for name, both in taken.items():
        rows[name] = {"equal_ids": equal[name]}
        for what, seconds in both.items():
            ratios = sorted(a / b for a, b in zip(seconds, taken["retro_np"][what], strict=True))
            middle, ratio = statistics.median(seconds), statistics.median(ratios)
            rows[name][what] = {"seconds": middle, "times_ours": ratio, "from": ratios[0], "to": ratios[-1]}
            print(
                f"  {name:18} {what:7} {1e3 * middle:9.2f} ms   {ratio:6.2f} × ours "
                f"({ratios[0]:.2f} … {ratios[-1]:.2f})   {equal[name]:.2%} of the ids are ours"
            )
    return rows, ids["retro_np"]


def compare_approximate(files, rounds, threads, recall):
    """Rows of (b). recall(ids) -> the share of the exact neighbours found."""
    rows, makers = {}, there(APPROXIMATE)
    with peers({name: make for name, (make, _) in makers.items()}, files) as turn:
        for name in turn.names:
            rows[name] = {"build_seconds": turn(name, "build", threads), "build_threads": threads, "settings": []}
            print(f"  {name:18} built in {rows[name]['build_seconds']:.1f} s, threads: {threads}")
        for step in range(max(len(settings) for _, settings in makers.values())):
            due = {name: makers[name][1][step] for name in turn.names if step < len(makers[name][1])}
            found = [{name: turn(name, "search", setting) for name, setting in due.items()} for _ in range(rounds)]
            for name, setting in due.items():
                medians = [statistics.median(one[name][1]) for one in found]
                row = {"setting": setting, "recall": recall(found[0][name][0])}
                row |= {"median": statistics.median(medians), "from": min(medians), "to": max(medians)}
                row["p95"] = statistics.median(statistics.quantiles(one[name][1], n=20)[-1] for one in found)
                rows[name]["settings"].append(row)
    for name, row in rows.items():
        for one in row["settings"]:
            print(
                f"  {name:18} {one['setting']:5}   recall@{search_peers.K} {one['recall']:.4f}"
                f"   {1e6 * one['median']:7.0f} µs, 95th percentile {1e6 * one['p95']:7.0f} µs"
            )
        for goal in (0.95, 0.99):
            fit = [one for one in row["settings"] if one["recall"] >= goal]
            best = min(fit, key=lambda one: one["median"]) if fit else None
            row[f"at_recall_{goal}"] = best
            print(f"  {name:18} recall ≥ {goal}: " + (f"{1e6 * best['median']:.0f} µs" if best else "not reached"))
    return rows


def measure(label, held_out, keys, options):
    """A table and its rows, of one set of keys."""
    import numpy as np
    import search_keys

    print(f"\n{len(keys)} keys of {keys.shape[1]}: {label}; {len(held_out)} queries held out")
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
    """Print a table for each set of keys, and save them all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", help="real keys, .npy (N, d) float32")
    parser.add_argument("--sizes", type=int, nargs="*", default=[10_000, 100_000], help="how many keys, one table each")
    parser.add_argument("--hashed", type=int, help="a table of so many hashed keys, made of the Python files at hand")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--singles", type=int, default=20, help="queries one at a time in a turn of exact search")
    parser.add_argument("--build-threads", type=int, default=1, help="1 as retro_np builds: the same graph every time")
    parser.add_argument("--exact-only", action="store_true")
    parser.add_argument("-o", "--out", help="write the figures as JSON")
    options = parser.parse_args()
    import numpy as np  # here, not above: see search_peers.py
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
                print(f"\n{size} keys were asked for, and there are {len(keys)} beside the queries: left out")
                continue
            some = keys[np.sort(rng.permutation(len(keys))[:size])]
            results["tables"].append(measure(label, held_out, some, options))
    if options.hashed:
        rng = np.random.default_rng(SEED)
        label, keys = search_keys.hashed(options.hashed + options.queries, rng)
        results["tables"].append(measure(label, *search_keys.split(keys, options.queries, rng), options))
    save(options.out, results)


if __name__ == "__main__":
    main()
