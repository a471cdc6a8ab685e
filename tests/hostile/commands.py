"""Hostile databases, checkpoints, runs, corpora and options given to the commands, each in a forked process.

A command may work or be refused in one line. Whatever it does, no file of the user changes, nothing is written outside
the output that was named, and nothing of a text reaches the terminal unchanged.
"""

import contextlib
import faulthandler
import io
import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import memory_runs
import numpy as np
from hostile import checkpoints, corpora, databases, values
from hostile.databases import Mutation, mutation
from hostile.values import odd_text, pick

import retro_np
from retro_np import progress
from retro_np.config import EncoderConfig, RetroConfig
from retro_np.training import loop
from retro_np.training.config import TrainingConfig

TIMEOUT = 20.0  # seconds
ESCAPED = 70  # the exit status that stands for an exception that left `main`
MEMORY = 6 << 30  # bytes of address space beyond those that a worker has
SIZES = ("--d-model", "4", "--d-ffw", "4", "--n-heads", "1", "--d-head", "4", "--n-layers", "2", "--cca-layers", "2",
         "--encoder-layers", "1", "--sequence-length", "16", "--batch-size", "1", "--warmup", "0")  # fmt: skip
USER_FILES = {
    "notes.txt": b"my notes\n", "config.json": b"{}", "log.jsonl": b"", "x.partial": b"half of mine",
    "work/draft.txt": b"draft",
    "edit/photo.raw": b"photo", "deep/er/results.json": b"[]", ".lock": b"mine",
    "deep/checkpoint.safetensors": b"weights",
}  # fmt: skip


class Command(NamedTuple):
    """A command line, how its output is read, and the folders and files below the case where it may write."""

    arguments: list[str]
    mode: str  # plain, colour, or pty
    outputs: tuple[str, ...]
    kind: str
    past: bool


class Failure(NamedTuple):
    """What went wrong. cause: what failures of one cause have in common."""

    kind: str
    cause: str


class Yard:
    """A folder where cases are laid out: `case/` holds the files of one of them."""

    def __init__(self, base: Path, scratch: Path):
        self.base, self.case = base, scratch / "case"
        self.cache = scratch / "cache"
        self.cache.mkdir(parents=True, exist_ok=True)
        self.stored = {name: databases.stored(base / name) for name in ("plain", "hostile")}
        self.checkpoint = (base / "run" / "checkpoint.safetensors").read_bytes()
        self.lines = (base / "plain.jsonl").read_bytes()

    def lay_out(self) -> None:
        """The user's files, a database of links to the valid one, a run, and folders for outputs."""
        if self.case.exists():
            shutil.rmtree(self.case)
        for folder in ("user", "out", "cwd"):
            (self.case / folder).mkdir(parents=True)
        for name, data in USER_FILES.items():
            (self.case / "user" / name).parent.mkdir(parents=True, exist_ok=True)
            (self.case / "user" / name).write_bytes(data)

    def database(self, name: str, change: Mutation | None = None) -> Path:
        """A database, with a file of the user's in it, and changed."""
        path = self.case / "db"
        shutil.copytree(self.base / name, path, copy_function=os.link, ignore=shutil.ignore_patterns(".lock"))
        (path / "notes of mine.txt").write_bytes(b"mine")
        (path / "shards" / "mine.partial").write_bytes(b"mine")
        for file, data in (change.files if change else {}).items():
            (path / file).parent.mkdir(parents=True, exist_ok=True)
            (path / file).unlink(missing_ok=True)
            if data is not None:
                (path / file).write_bytes(data)
        return path

    def run(self, name: str = "run") -> Path:
        """A run that was interrupted after its first step."""
        path = self.case / "run"
        shutil.copytree(self.base / name, path, ignore=shutil.ignore_patterns(".lock"))
        (path / "notes of mine.txt").write_bytes(b"mine")
        (path / "mine.partial").write_bytes(b"mine")
        return path


def prepare(base: Path) -> None:
    """Make what a `Yard` reads: three databases, and interrupted runs of a RETRO and of a decoder's memory."""
    for name in ("plain", "hostile"):
        if not (base / name / "manifest.json").exists():
            databases.build(base / name, hostile=name == "hostile")
    more = ({"name": f"new {i}", "text": f"more words {i} " * 9} for i in range(3))
    (base / "more.jsonl").write_text("".join(json.dumps(record) + "\n" for record in more))
    database = retro_np.Database.open(base / "plain")
    config = RetroConfig(database.vocabulary_size, 4, 4, 1, 4, 2, (2,), 8, EncoderConfig(4, 4, 1, 4, 1, (1,)))
    training = TrainingConfig(2, 16, 1, 1, 2, warmup=0, checkpoint_every=1, eval_every=1)
    step = loop.train_step

    def interrupted(*arguments):
        if arguments[5] == 1:
            raise KeyboardInterrupt
        return step(*arguments)

    model = memory_runs.write_decoder(base / "memory model")
    memories = retro_np.Database.open(memory_runs.build(base / "memory", model / "tokenizer.json"))
    loop.train_step = interrupted
    try:
        with contextlib.suppress(KeyboardInterrupt):
            loop.train(database, config, training, base / "run")
        with contextlib.suppress(KeyboardInterrupt):
            own = replace(training, learning_rate=2e-3, weight_decay=0.0, random_share=0.25)  # as `train --retrofit`
            memory_runs.train_memory(memories, model, base / "memory run", own)
    finally:
        loop.train_step = step


def _snapshot(root: Path) -> dict[str, tuple]:
    """Every file, link and folder below a folder: folders by name, files by their identity and contents' facts."""
    found = {}
    for parent, folders, names in os.walk(os.fsencode(root)):
        for name in [*folders, *names]:
            path = os.path.join(parent, name)
            status = os.lstat(path)
            relative = os.fsdecode(os.path.relpath(path, os.fsencode(root)))
            is_folder = os.path.isdir(path) and not os.path.islink(path)
            found[relative] = () if is_folder else (status.st_ino, status.st_size, status.st_mtime_ns, status.st_mode)
    return found


OPTIONS = {
    "search": ("-k", "--neighbours"), "sample": ("--length", "-k", "--temperature", "--top-p", "--top-k", "--seed",
    "--prompt"),
    "inspect": ("--length", "-k", "--temperature", "--seed"), "evaluate": ("--limit", "--stride", "--sequence-length",
    "-k", "--split",
    "--fraction", "--fraction-seed"), "train": ("--d-model", "--d-ffw", "--n-heads", "--d-head", "--n-layers",
    "--cca-layers",
    "--encoder-layers", "--sequence-length", "--batch-size", "--micro-batches", "--learning-rate", "--warmup",
    "--weight-decay",
    "--dropout", "--retrieval-off", "--seed", "-k", "--retrieved-part", "--preset", "--clip", "--beta1", "--beta2",
    "--schedule", "--min-learning-rate", "--eval-every", "--eval-chunks", "--segments", "--encoder-d-model",
    "--encoder-ca-layers", "--log", "--config"), "build": ("--chunk-size",
    "--vocabulary-size",
    "--held-out", "--held-out-bytes", "--deduplicate", "--text-field", "--name-field", "--split-field", "--embedder",
    "--train", "--valid", "--test", "--config", "--keys", "--neighbours", "--extra-candidates", "--limit-mb",
    "--shard-mb", "--d-key", "--include",
    "--exclude", "--tokenizer"), "add": ("--include", "--exclude"), "remove": ("--document", "--name"), "compact": (),
    "verify": (),
}  # fmt: skip
VALUES = ("0", "1", "-1", "2", "10", "1e9", "1e30", "9999999999", "99999999999999999999", "nan", "inf", "-inf", "",
"0.5", "x", "1,2",
          "1,10000000000", "²", "1_0", "٣", "0x10", "1e-320", "[red]", "a\x1b[2Jb")  # fmt: skip


def _options(rng, command: str) -> list[str]:
    if not OPTIONS[command] or rng.random() > 0.15:
        return []
    value = pick(rng, VALUES) if rng.random() < 0.8 else odd_text(rng).replace("\0", "")
    return [pick(rng, OPTIONS[command]), value.encode("utf-8", "replace").decode()]


def _one_of(rng, commands, checkpoint, db, out):
    """The arguments and outputs of one of the commands or, seldom, of an evaluation, which takes longest."""
    if rng.random() < 0.03:
        arguments = ["evaluate", checkpoint, db, "-o", out / "ev", "--sequence-length", 16, "--stride", 8, "--limit", 3]
        return [str(a) for a in arguments], ("out/ev",)
    arguments, outputs = pick(rng, commands)
    return [str(argument) for argument in arguments], outputs


def _on_database(rng, yard: Yard, db: Path, run: Path) -> tuple[list[str], tuple[str, ...]]:
    """A command that opens a database, and where it may write."""
    checkpoint, out = str(run / "checkpoint.safetensors"), yard.case / "out"
    commands: tuple[tuple[list, tuple], ...] = (
        (["search", db, "word1 is 2"], ()), (["search", db, "word1 is 2", "--json", "-k", 50], ()), (["search", db,
        "x", "--exact"], ()),
        (["verify", db], ()), (["verify", db], ()), (["sample", checkpoint, db, "--length", 10, "--page",
        out / "s.html"], ("out/s.html",)),
        (["sample", checkpoint, db, "--length", 9], ()),
        (["inspect", checkpoint, db, "word1 is 2 word2 is 3", "-o", out / "i.html"], ("out/i.html",)),
        (["train", db, "-o", out / "run", *SIZES, "--steps", 1], ("out/run",)),
        (["add", db, yard.base / "more.jsonl"], ("db",)), (["remove", db, "--document", pick(rng, (1, 3, "doc 3",
        99))], ("db",)),
        (["compact", db], ("db",)),
        (["build", yard.base / "more.jsonl", "-o", out / "db2", "--like", db, "--held-out", 0.3], ("out/db2",)),
    )  # fmt: skip
    return _one_of(rng, commands, checkpoint, db, out)


def command(seed: int, number: int, yard: Yard) -> Command:
    """Lay out a case and return its command."""
    rng = np.random.default_rng([seed, number, 1])
    yard.lay_out()
    mode = pick(rng, ("plain",) * 7 + ("colour", "colour", "pty"))
    kind, out = rng.random(), yard.case / "out"
    if kind < 0.06:
        settings = yard.case / pick(rng, ("run.toml", "config.json"))
        settings.write_bytes(values.settings(rng, (yard.base / "run" / "config.json").read_bytes()))
        start = ["train", yard.database("plain"), "-o", out / "run", "--config", settings]
        arguments = [str(argument) for argument in (*start, *SIZES[-6:], "--steps", 1)]
        outputs, subject, past = ("out/run",), "settings", True
    elif kind < 0.6:
        name = "plain" if rng.random() < 0.85 else "hostile"
        change = mutation(rng, yard.stored[name], str(yard.case / "unpickled"))
        arguments, outputs = _on_database(rng, yard, yard.database(name, change), yard.run())
        if change.what.startswith("edit/"):
            outputs = (*outputs, "db")
        subject, past = "database", change.past
    elif kind < 0.68:
        arguments, outputs = _on_database(rng, yard, yard.database("hostile"), yard.run())
        subject, past = "texts", True
    elif kind < 0.74:
        run, names = yard.run("memory run"), ("retro", "../run", str(yard.base / "memory model"), "smollm2", "")
        file, action = pick(rng, ("checkpoint.safetensors",) * 4 + checkpoints.RUN_FILES), rng.random()
        data = (run / file).read_bytes()
        if file != "checkpoint.safetensors":
            data = checkpoints.changed_run(rng, file, data)
        else:
            data = checkpoints.changed_base(rng, data, names) if action < 0.3 else checkpoints.changed(rng, data)
        (run / file).write_bytes(data)
        arguments, outputs = _on_memory(rng, yard, yard.database("memory"), run)
        subject, past = "memory", not file.endswith("safetensors") or checkpoints.parses(data)
    elif kind < 0.86:
        run, data = yard.run(), checkpoints.changed(rng, yard.checkpoint)
        (run / "checkpoint.safetensors").write_bytes(data)
        arguments, outputs = _on_checkpoint(rng, yard, yard.database("plain"), run)
        subject, past = "checkpoint", checkpoints.parses(data)
    elif kind < 0.9:
        run, name = yard.run(), pick(rng, checkpoints.RUN_FILES)
        (run / name).write_bytes(checkpoints.changed_run(rng, name, (run / name).read_bytes()))
        arguments, outputs = _resumed(yard.database("plain"), run), ("run",)
        subject, past = "run", True
    else:
        folder = yard.case / "corpora"
        folder.mkdir()
        corpus = (
            corpora.write_folder(rng, folder) if rng.random() < 0.6 else corpora.write_file(rng, folder, yard.lines)
        )
        if rng.random() < 0.7:
            held_out = pick(rng, (["--held-out", "0"], ["--held-out", "0.5"], ["--held-out-bytes", "0.5"]))
            arguments = ["build", str(corpus), "-o", str(out / "new"), "--embedder", "hashing", "--d-key", "8",
                         "--vocabulary-size", "260", *held_out]  # fmt: skip
            outputs = ("out/new",)
        else:
            arguments, outputs = ["add", str(yard.database("plain")), str(corpus)], ("db",)
        subject, past = "corpus", True
    return Command([*arguments, *_options(rng, arguments[0])], mode, outputs, subject, past)


def _resumed(db, run) -> list[str]:
    watched = ["--checkpoint-every", "1", "--eval-every", "1", "--log", "csv"]
    return ["train", str(db), "-o", str(run), *SIZES, "--steps", "2", *watched]


def _on_checkpoint(rng, yard, db, run):
    checkpoint, out = str(run / "checkpoint.safetensors"), yard.case / "out"
    commands = (
        (["sample", checkpoint, db, "--length", 10], ()), (["sample", checkpoint, db, "--length", 9], ()),
        (["inspect", checkpoint, db, "word1 is 2 word2 is 3", "-o", out / "i.html"], ("out/i.html",)),
        (_resumed(db, run), ("run",)), (_resumed(db, run), ("run",)),
        (["train", db, "-o", out / "run", "--retrofit", checkpoint, "--steps", 1, "--cca-layers", "2",
        "--sequence-length", 16], ("out/run",)),
    )  # fmt: skip
    return _one_of(rng, commands, checkpoint, db, out)


def _on_memory(rng, yard, db, run):
    checkpoint, out, model = str(run / "checkpoint.safetensors"), yard.case / "out", yard.base / "memory model"
    few = ("--sequence-length", 16, "--batch-size", 1, "--warmup", 0, "--checkpoint-every", 1, "--eval-every", 1)
    resumed = ["train", db, "-o", run, "--retrofit", model, *few, "--steps", 2, "--rank", 2]
    repeated = ["train", db, "-o", out / "run", "--retrofit", model, "--config", run / "config.json", "--steps", 1]
    commands = (
        (["sample", checkpoint, db, "--length", 9], ()), (["sample", run, db, "--length", 10], ()),
        (["inspect", run, db, "self value index", "-o", out / "i.html"], ("out/i.html",)),
        (resumed, ("run",)), ([*resumed, "--cca-layers", "1,2"], ("run",)), (repeated, ("out/run",)),
        ([*repeated, "--baseline"], ("out/run",)),
    )  # fmt: skip
    return _one_of(rng, commands, checkpoint, db, out)


def limit_memory() -> None:
    """Let this process have MEMORY more address space than it has now, so that a wild allocation fails."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))


def _child(arguments: list[str], mode: str, out: int, err: int, yard: Yard) -> None:
    """Run a command in this forked process, which ends here."""
    status = ESCAPED
    try:
        faulthandler.disable()  # pytest enables it, and a crash is counted by its signal
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.chdir(yard.case / "cwd")
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(io.FileIO(fd, "w", closefd=False), "utf-8", write_through=True, line_buffering=True)
            for fd in (1, 2)
        )
        sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False))
        sys.argv = ["retro-np", *arguments]
        os.environ["XDG_CACHE_HOME"] = str(yard.cache)
        os.environ["COLUMNS"] = "200"
        if mode != "plain":
            for name, module in list(sys.modules.items()):
                if name.startswith("retro_np.") and "console" in vars(module):
                    module.console = progress.safe_console(force_terminal=True, color_system="truecolor", width=200)
        if mode == "colour":
            os.environ["FORCE_COLOR"] = "1"
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from retro_np.cli import main

        try:
            main()
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 0 if error.code is None else ESCAPED
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        status = ESCAPED
        os.write(2, traceback.format_exc().encode("utf-8", "backslashreplace"))
    finally:
        os._exit(status)


def run_forked(arguments: list[str], mode: str, yard: Yard, timeout: float = TIMEOUT) -> tuple[int | None, str, str]:
    """A command's exit status (negative for a signal, None for a time-out), its output and its errors."""
    outputs = [yard.case.parent / name for name in ("stdout", "stderr")]
    master = -1
    if mode == "pty":
        master, slave = os.openpty()
        descriptors = [slave, slave]
    else:
        descriptors = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600) for path in outputs]
    process = os.fork()
    if process == 0:
        _child(arguments, mode, *descriptors, yard)
    for descriptor in {*descriptors}:
        os.close(descriptor)
    status, shown, deadline = None, b"", time.monotonic() + timeout
    pause = 0.001
    while status is None and time.monotonic() < deadline:
        if mode == "pty":
            shown += _available(master, pause)
        done, result = os.waitpid(process, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(result)
        elif mode != "pty":
            time.sleep(pause)
        pause = min(pause * 1.3, 0.02)
    if status is None:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    if mode == "pty":
        while more := _available(master, 0):
            shown += more
        os.close(master)
        text = shown.decode("utf-8", "surrogateescape").replace("\r\n", "\n")
        return status, text, text
    return status, *(path.read_bytes().decode("utf-8", "surrogateescape") for path in outputs)


def _available(master: int, wait: float) -> bytes:
    try:
        return os.read(master, 1 << 16) if select.select([master], [], [], wait)[0] else b""
    except OSError:  # The other end is closed.
        return b""


FRAME = re.compile(r'File "[^"]*/(retro_np/[^"]+)", line (\d+)')
EXCEPTION = re.compile(r"^([A-Za-z_][\w.]*)(?::|$)", re.MULTILINE)


def cause_of(text: str) -> str:
    """The exception and the innermost line of retro_np in a traceback."""
    frames, exceptions = FRAME.findall(text), EXCEPTION.findall(text)
    return f"{exceptions[-1] if exceptions else '?'} at {':'.join(frames[-1]) if frames else '?'}"


def judge(
    case: Command, status: int | None, out: str, err: str, before: dict, after: dict, yard: Yard
) -> list[Failure]:
    """Everything that a command did and may not do."""
    name = case.arguments[0]
    failures = []
    if status is None:
        failures.append(Failure("time-out", name))
    elif status < 0:
        failures.append(Failure("crash", f"{name}: {signal.Signals(-status).name}"))
    elif status == ESCAPED or "Traceback (most recent call last)" in err:
        failures.append(Failure("traceback", f"{cause_of(err)} ({name})"))
    elif status not in (0, 2):
        failures.append(Failure("status", f"{name}: {status}"))
    elif status == 2 and case.mode != "pty":
        lines = err.splitlines()
        if len(lines) != 1 or not lines[0].startswith("retro-np: "):
            failures.append(Failure("several lines", f"{name}: {len(lines)}: {err[:300]!r}"))
    for stream, text in (("stdout", out), ("stderr", err)):
        found = values.sent(text, case.mode != "plain", case.mode == "pty")
        if found and status != ESCAPED:
            failures.append(Failure("escape", f"{name} {stream}: {found}"))
        try:
            text.encode()
        except UnicodeEncodeError as error:
            failures.append(
                Failure("escape", f"{name} {stream}: bytes that are not UTF-8: {text[error.start - 20 : error.end]!r}")
            )
    allowed = tuple(f"{output}/" for output in case.outputs)
    theirs = ("db/notes of mine.txt", "db/shards/mine.partial", "run/notes of mine.txt", "run/mine.partial")
    for path in before.keys() | after.keys():
        inside = (
            path in case.outputs
            or path.startswith(allowed)
            or (path.rpartition("/")[2] == ".lock" and not path.startswith("user/"))
        )
        if before.get(path) != after.get(path) and (not inside or path in theirs):
            change = "lost" if path not in after else "new" if path not in before else "changed"
            failures.append(Failure("lost", f"{name}: {path} is {change}"))
    return failures


def run_case(seed: int, number: int, yard: Yard) -> tuple[Command, list[Failure]]:
    """Lay out a case, run it, and judge it."""
    case = command(seed, number, yard)
    before = _snapshot(yard.case)
    status, out, err = run_forked(case.arguments, case.mode, yard)
    return case, judge(case, status, out, err, before, _snapshot(yard.case), yard)


def warm_up(yard: Yard) -> None:
    """Run the commands once in this process, so that forked ones find everything imported and compiled."""
    yard.lay_out()
    db, run = yard.database("plain"), yard.run()
    from retro_np.cli import run as run_command

    out = yard.case / "out"
    checkpoint = run / "checkpoint.safetensors"
    lines = (
        ["search", db, "word1"], ["verify", db], ["sample", checkpoint, db, "--length", 9, "--page", out / "s.html"],
        ["inspect", checkpoint, db, "word1 is 2", "-o", out / "i.html"], ["train", db, "-o", out / "run", *SIZES,
        "--steps", 1],
        ["sample", yard.base / "memory run", yard.base / "memory", "--length", 9],
        ["evaluate", checkpoint, db, "-o", out / "ev", "--sequence-length", 16, "--stride", 8, "--limit", 3],
        ["add", db, yard.base / "more.jsonl"], ["remove", db, "--document", 3], ["compact", db],
        ["build", yard.base / "more.jsonl", "-o", out / "db2", "--like", db, "--held-out", 0.3],
        ["build", yard.base / "plain.jsonl", "-o", out / "new", "--embedder", "hashing", "--d-key", 8,
        "--vocabulary-size", 260],
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for line in lines:
            run_command([str(argument) for argument in line])
