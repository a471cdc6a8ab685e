"""What hostile databases, checkpoints, runs, corpora and options do to retro_np: counted by kind of failure.

python benchmarks/reliability.py [--seed 0] [--parsers 1000000] [--commands 10000] [-o results.json]      run
python benchmarks/reliability.py --seed 5 --first 17 --parsers 1 --commands 0      repeat input 17 of a seed
python benchmarks/reliability.py --write    rewrite the tables in docs/reliability.md
python benchmarks/reliability.py --check    exit with status 1 if they do not show benchmarks/results/reliability.json

The generators are in tests/hostile. An input is determined by the seed and its number. Worker processes take the
inputs in batches, so that a crash ends one worker and is counted.
"""

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from importlib import metadata
from pathlib import Path

for variable in ("RETRO_NP_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[variable] = "1"  # Worker processes are forked, and threads do not survive a fork.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["NO_COLOR"] = "1"

from report import ROOT, results, table, write_sections  # noqa: E402
from turns import machine, save  # noqa: E402

BATCH = {"parsers": 500, "commands": 10}
TIMEOUT = {"parsers": 20.0, "commands": 60.0}  # seconds without progress
FAILURES = {
    "crash": "crashes",
    "time-out": "time-outs",
    "traceback": "tracebacks",
    "several lines": "errors of more than one line",
    "status": "other exit statuses",
    "escape": "control characters sent",
    "lost": "files changed or lost",
}
KINDS = tuple(FAILURES)
TITLES = {"parsers": "parsers and kernels", "commands": "commands"}
MAX_EXAMPLES, BROKEN = 3, 99  # BROKEN: the exit status of a worker whose generator failed


def parsers_worker(base, scratch, seed):
    """A function that runs the parser input of a number: (kind, past the first parser, failures)."""
    from hostile import parsers

    from retro_np.errors import UserError

    world = parsers.World(base, scratch)
    canary = Path(world.canary)

    def run(number):
        kind, past, call = parsers.case(seed, number, world)
        failures = []
        try:
            call()
        except UserError as error:
            if not str(error).strip():
                failures.append(("several lines", f"{kind}: an error without a text"))
        except MemoryError:
            failures.append(("traceback", innermost(kind)))
        except Exception:
            failures.append(("traceback", innermost(kind)))
        if canary.exists():
            canary.unlink()
            failures.append(("lost", f"{kind}: an object was unpickled"))
        return kind, bool(getattr(past, "past", past)), failures

    return run


def innermost(kind):
    """The exception that is being handled, and the innermost line of retro_np where it passed."""
    error_type, error, trace = sys.exc_info()
    frames = [f for f in traceback.extract_tb(trace) if "/retro_np/" in f.filename]
    where = (
        f"retro_np/{frames[-1].filename.partition('/retro_np/')[2]}:{frames[-1].lineno}"
        if frames
        else f"? {error}"[:200]
    )
    return f"{error_type.__name__} at {where} ({kind})"


def commands_worker(base, scratch, seed):
    """A function that runs the command of a number, as above."""
    from hostile import commands

    yard = commands.Yard(base, scratch)
    commands.warm_up(yard)

    def run(number):
        case, failures = commands.run_case(seed, number, yard)
        return f"{case.arguments[0]}, {case.kind}", case.past, [tuple(failure) for failure in failures]

    return run


WORKERS = {"parsers": parsers_worker, "commands": commands_worker}


class Worker:
    """A forked process that runs batches. It writes each input's number before it runs, and a line after a batch."""

    def __init__(self, part, base, folder, seed):
        self.part, self.base, self.folder, self.seed = part, base, folder, seed
        self.batch = None
        self.start()

    def start(self):
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        (self.folder / "number").write_bytes(b"\0" * 8)
        orders, self.orders = os.pipe()
        self.answers, answers = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            os.close(self.orders), os.close(self.answers)
            self.work(orders, answers)
        os.close(orders), os.close(answers)
        self.reader = os.fdopen(self.answers, "rb")
        self.moved = time.monotonic()
        self.seen = None

    def work(self, orders, answers):
        """Run batches until the pipe closes."""
        try:
            quiet = os.open(os.devnull, os.O_RDWR)
            if not os.environ.get("RELIABILITY_LOUD"):
                os.dup2(quiet, 1)
            run = WORKERS[self.part](self.base, self.folder / "scratch", self.seed)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + (3 << 30)
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
            progress = os.open(self.folder / "number", os.O_WRONLY)
            with os.fdopen(orders, "rb") as lines, os.fdopen(answers, "wb") as out:
                for line in lines:
                    first, last = json.loads(line)
                    kinds, failures = Counter(), []
                    for number in range(first, last):
                        os.pwrite(progress, number.to_bytes(8, "little"), 0)
                        kind, past, found = run(number)
                        kinds[kind, past] += 1
                        failures += [(number, kind, *failure) for failure in found]
                    counts = [[kind, past, count] for (kind, past), count in kinds.items()]
                    out.write(json.dumps([counts, failures]).encode() + b"\n")
                    out.flush()
        except BaseException:
            traceback.print_exc()
            os._exit(BROKEN)
        os._exit(0)

    def give(self, batch):
        self.batch = batch
        self.moved = time.monotonic()
        os.write(self.orders, json.dumps(batch).encode() + b"\n")

    def number(self):
        return int.from_bytes((self.folder / "number").read_bytes(), "little")

    def stuck(self):
        """Whether the same input has been running for too long."""
        number = self.number()
        if number != self.seen:
            self.seen, self.moved = number, time.monotonic()
        return time.monotonic() - self.moved > TIMEOUT[self.part]

    def end(self):
        """End the process. Other workers hold its pipe open, so it would not see that this end is closed."""
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        os.close(self.orders)
        self.reader.close()


def run_part(part, seed, first, count, n_workers, base, scratch):
    """Run the inputs first … first + count − 1. Returns their counts by kind and the failures."""
    import select

    pending = [[n, min(n + BATCH[part], first + count)] for n in range(first, first + count, BATCH[part])][::-1]
    kinds, failures, done, start = Counter(), [], 0, time.monotonic()
    workers = [Worker(part, base, scratch / f"{part}{i}", seed) for i in range(min(n_workers, len(pending)))]
    for worker in workers:
        worker.give(pending.pop())
    shown = time.monotonic()
    while busy := [worker for worker in workers if worker.batch]:
        poll = select.poll()  # `select` takes no descriptor above 1023
        for worker in busy:
            poll.register(worker.answers, select.POLLIN)
        ready = [descriptor for descriptor, _ in poll.poll(500)]
        for worker in busy:
            line = worker.reader.readline() if worker.answers in ready else b""
            if line.endswith(b"\n"):
                counts, found = json.loads(line)
                for kind, past, n in counts:
                    kinds[kind, past] += n
                    done += n
                failures += found
                worker.batch = None
            elif worker.answers in ready or worker.stuck():  # it died, or hangs
                number, hangs = worker.number(), worker.answers not in ready
                if hangs:
                    os.kill(worker.process, signal.SIGKILL)
                status = os.waitstatus_to_exitcode(os.waitpid(worker.process, 0)[1])
                if status == BROKEN:
                    raise SystemExit(f"the generator failed at input {number} of {part}")
                name = signal.Signals(-status).name if status < 0 else f"status {status}"
                failures.append([number, part, "time-out" if hangs else "crash", f"{kind_at(part, number)}: {name}"])
                kinds[kind_at(part, number), True] += 1
                done += 1
                worker.reader.close(), os.close(worker.orders)
                begin, end = worker.batch
                # The counts of the batch died with the worker, so its other inputs run again, without this one.
                pending += [part for part in ([begin, number], [number + 1, end]) if part[0] < part[1]]
                worker.start()
                worker.batch = None
            if worker.batch is None and pending:
                worker.give(pending.pop())
        if time.monotonic() - shown > 30:
            shown = time.monotonic()
            rate = done / (shown - start)
            print(
                f"{part}: {done:,} of {count:,}, {rate:.0f} a second, {len(failures)} failures",
                file=sys.stderr,
                flush=True,
            )
    for worker in workers:
        worker.end()
    return kinds, failures, time.monotonic() - start


def kind_at(part, number):
    """The kind of a parser's input; of a command, its part."""
    if part == "parsers":
        from hostile.parsers import kind_of

        return kind_of(number)
    return part


def figures_of(kinds, failures, seconds, count):
    """What is saved about a part."""
    by_cause = {}
    for number, _, failure, cause in failures:
        by_cause.setdefault((failure, cause), []).append(number)
    totals = Counter()
    for (kind, _), n in kinds.items():
        totals[kind] += n
    return {
        "inputs": count,
        "kinds": dict(sorted(totals.items())),
        "past": sum(n for (_, past), n in kinds.items() if past),
        "failures": {kind: sum(failure[2] == kind for failure in failures) for kind in KINDS},
        "causes": [
            {"failure": failure, "cause": cause, "count": len(numbers), "examples": sorted(numbers)[:MAX_EXAMPLES]}
            for (failure, cause), numbers in sorted(by_cause.items(), key=lambda item: -len(item[1]))
        ],
        "seconds": round(seconds, 1),
    }


def summary():
    """The failures of each part by kind, and how they were found."""
    figures = results("reliability")
    parts = figures["parts"]
    rows = [["inputs", *(f"{row['inputs']:,}" for row in parts.values())]]
    rows.append(["past their hash and first parser", *(f"{row['past'] / row['inputs']:.1%}" for row in parts.values())])
    rows += [[FAILURES[kind], *(row["failures"][kind] for row in parts.values())] for kind in KINDS]
    rows.append(["seconds", *(f"{row['seconds']:,.0f}" for row in parts.values())])
    facts = figures["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return [
        table(["", *(TITLES[name] for name in parts)], rows),
        f"`{figures['command']}`, seed {figures['seed']}, on {facts['cores']} cores of an {facts['processor']} with "
        f"{versions}.",
    ]


def inputs():
    """The number of inputs of each kind."""
    parts = results("reliability")["parts"]
    return [
        table([TITLES[part], "inputs"], [[kind, f"{n:,}"] for kind, n in row["kinds"].items()])
        for part, row in parts.items()
    ]


def causes():
    """The distinct causes of the failures, each with inputs that repeat it."""
    parts = results("reliability")["parts"]
    rows = [
        [row["count"], row["failure"], f"`{row['cause'].replace('|', '/')}`",
        f"{part} {', '.join(map(str, row['examples']))}"]
        for part, figures in parts.items() for row in figures["causes"]
    ]  # fmt: skip
    return [table(["times", "failure", "cause", "inputs"], rows) if rows else "There was none."]


SECTIONS = {"summary": summary, "inputs": inputs, "causes": causes}


def main():
    """Run and save, or rewrite or check the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parsers", type=int, default=1_000_000, help="inputs for parsers and kernels")
    parser.add_argument("--commands", type=int, default=10_000, help="inputs for commands")
    parser.add_argument("--first", type=int, default=0, help="the number of the first input")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("-o", "--out", help="write the figures as JSON")
    parser.add_argument("--write", action="store_true", help="rewrite the tables in docs/reliability.md")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if the page does not show the results")
    options = parser.parse_args()
    if options.write or options.check:
        sections = {name: "\n\n".join(make()) for name, make in SECTIONS.items()}
        return write_sections(ROOT / "docs" / "reliability.md", "reliability.py --write", sections, options.check)
    sys.path.insert(0, str(ROOT / "tests"))
    facts = machine()
    facts["versions"] = {
        name: metadata.version(name) for name in ("retro-np", "numpy", "hnswlib", "safetensors", "tokenizers")
    }
    figures = {
        "command": " ".join(["python benchmarks/reliability.py", *sys.argv[1:]]),
        "seed": options.seed,
        "parts": {},
        "machine": facts,
    }
    home = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="reliability", dir=home) as folder:
        base = Path(folder) / "base"
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
        with contextlib.redirect_stdout(None):
            from hostile import commands, parsers

            parsers.prepare(base)
            if options.commands:
                commands.prepare(base)
        for part in ("parsers", "commands"):
            if count := getattr(options, part):
                run = run_part(part, options.seed, options.first, count, options.workers, base, Path(folder))
                row = figures["parts"][part] = figures_of(*run, count)
                failed = ", ".join(f"{n} × {kind}" for kind, n in row["failures"].items() if n) or "no failure"
                print(
                    f"seed {options.seed}: {count:,} {part}, {row['past'] / count:.1%} past hash and first parser: "
                    f"{failed}; {row['seconds']} s"
                )
                for cause in row["causes"][:60]:
                    print(f"  {cause['count']:6} {cause['failure']}: {cause['cause']}  e.g. {cause['examples']}")
    if options.out:
        save(options.out, figures)


if __name__ == "__main__":
    main()
