"""Time peers in turns, each in its own process, so that their threads and caches do not disturb each other."""

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
PACKAGES += ("faiss-cpu", "scann", "transformers")
PAUSE_SECONDS = 0.5  # before a turn, so that the threads of the previous peer fall asleep


def compare(makers, rounds, arguments=(), same=None, tuned=()):
    """Time the functions that the makers return, in turns, for a number of rounds. Returns one row per maker.

    makers: {name: function of `arguments` that returns a function to time}; the first one is the baseline. same(a, b):
    whether a peer's first result b agrees with the baseline's a; if not, nothing is timed. tuned: the peers that, like
    the baseline, get the settings of retro_np.runtime. A turn is two calls, and the second is timed.
    A row has the median seconds; the median, minimum and maximum of the ratios to the baseline's time in the same
    round; and the peak memory of the process in MB.
    """
    context, pipes = multiprocessing.get_context("spawn"), {}
    baseline = next(iter(makers))
    for name, make in makers.items():
        os.environ["RETRO_NP_TUNE"] = (
            "1" if name == baseline or name in tuned else "0"
        )  # the other peers run with their own settings
        pipes[name], child_end = context.Pipe()
        context.Process(target=_serve, args=(make, arguments, child_end), daemon=True).start()

    def turn(name, return_result=False):
        time.sleep(PAUSE_SECONDS)
        with contextlib.suppress(BrokenPipeError):  # the pipe has the error that ended the process
            pipes[name].send((True, return_result))
        answer = pipes[name].recv()
        if isinstance(answer, str):
            raise SystemExit(f"{name}: {answer}")
        return answer

    first = {name: turn(name, return_result=True)[2] for name in makers}  # this also compiles and fills caches
    for name, result in first.items():
        if same is not None and result is not None and not same(first[baseline], result):
            raise SystemExit(f"{name} computes a different result from {baseline}, so nothing is timed")
    turns = [{name: turn(name) for name in makers} for _ in range(rounds)]
    for pipe in pipes.values():
        pipe.send((False, False))
    rows = {}
    for name in makers:
        ratios = sorted(turn[name][0] / turn[baseline][0] for turn in turns)
        rows[name] = {
            "seconds": statistics.median(turn[name][0] for turn in turns),
            "times_ours": statistics.median(ratios),
            "from": ratios[0],
            "to": ratios[-1],
            "peak_mb": turns[-1][name][1],
        }
    return rows


def _serve(make, arguments, pipe):
    """Work on request. Sends (seconds, peak MB so far, the result if requested), or the text of an error."""
    try:
        work = make(*arguments)
        while True:
            continues, return_result = pipe.recv()
            if not continues:
                return
            work()  # replaces what the previous peer left in the caches
            start = time.perf_counter()
            result = work()
            pipe.send((time.perf_counter() - start, _peak_mb(), result if return_result else None))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


def _peak_mb():
    """The peak memory of this process. Linux counts the parent's peak into ru_maxrss, but not into VmHWM."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def machine():
    """Processor, cores and versions, on which the figures depend."""
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
    """Write figures as JSON if a path is given."""
    if path:
        Path(path).write_text(json.dumps(figures, indent=2, default=float) + "\n")
