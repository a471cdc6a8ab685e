"""Peers that take turns: each in a process of its own, so that no one's threads and caches are in another's way."""

import contextlib
import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
from importlib import metadata
from pathlib import Path

PACKAGES = ("retro-np", "numpy", "numba", "hnswlib", "torch", "onnxruntime", "sentence-transformers", "retro-pytorch")
PACKAGES += ("faiss-cpu", "scann")
PAUSE = 0.5  # seconds before a turn, for the threads of the one before to fall asleep


def compare(makers, rounds, arguments=(), same=None, tuned=()):
    """Time what each maker makes, in turn, so many rounds; the first one is ours. Returns a row for each.

    makers: {name: function of `arguments` that returns a function to time}. same(ours, theirs): whether a peer's first
    result is right; where it is not, nothing is timed. tuned: peers that get the settings of retro_np.runtime, as ours
    does. A turn is two calls, of which the second is timed.
    A row has the median seconds, the median of its ratios to ours in the same round, their least and largest, and the
    peak memory of its process in MB.
    """
    context, pipes = multiprocessing.get_context("spawn"), {}
    ours = next(iter(makers))
    for name, make in makers.items():
        os.environ["RETRO_NP_TUNE"] = "1" if name == ours or name in tuned else "0"  # what helps us is not theirs
        pipes[name], theirs = context.Pipe()
        context.Process(target=_serve, args=(make, arguments, theirs), daemon=True).start()

    def turn(name, want=False):
        time.sleep(PAUSE)
        with contextlib.suppress(BrokenPipeError):  # what it died of waits in the pipe
            pipes[name].send((True, want))
        found = pipes[name].recv()
        if isinstance(found, str):
            raise SystemExit(f"{name}: {found}")
        return found

    first = {name: turn(name, want=True)[2] for name in makers}  # compiles and fills caches, too
    for name, result in first.items():
        if same is not None and result is not None and not same(first[ours], result):
            raise SystemExit(f"{name} computes something else than {ours}: not timed")
    found = [{name: turn(name) for name in makers} for _ in range(rounds)]
    for pipe in pipes.values():
        pipe.send((False, False))
    rows = {}
    for name in makers:
        ratios = sorted(one[name][0] / one[ours][0] for one in found)
        rows[name] = {
            "seconds": statistics.median(one[name][0] for one in found),
            "times_ours": statistics.median(ratios),
            "from": ratios[0],
            "to": ratios[-1],
            "peak_mb": found[-1][name][1],
        }
    return rows


def _serve(make, arguments, pipe):
    """Work whenever asked; answer (seconds, peak MB so far, the result where it is wanted), or an error's text."""
    try:
        work = make(*arguments)
        while True:
            go_on, want = pipe.recv()
            if not go_on:
                return
            work()  # as in a loop: what the peer before left in the caches is gone then
            began = time.perf_counter()
            result = work()
            seconds = time.perf_counter() - began
            pipe.send((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, result if want else None))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


def machine():
    """What the figures depend on: processor, cores, versions."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {"processor": _processor(), "cores": len(os.sched_getaffinity(0)), "versions": versions}


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def save(path, figures):
    """Write figures as JSON, where a path is given."""
    if path:
        Path(path).write_text(json.dumps(figures, indent=2, default=float) + "\n")
