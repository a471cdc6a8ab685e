"""A command that is killed or meets an error of the disk, at any operation on files, does not lie and can be repeated.

Ground truth: the bytes that the same command writes without a disturbance.
"""

import errno
import io
import itertools
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hostile.commands import SIZES, run_forked
from support import all_bytes

from retro_np.kernels import threads

CHECKPOINT = "BASE/run/checkpoint.safetensors"
# Each command, what it starts from, and its output. All paths are below the case's folder or the fixture's.
COMMANDS = {
    "build": (
        "build",
        "BASE/plain.jsonl",
        "-o",
        "CASE/new",
        "--embedder",
        "hashing",
        "--d-key",
        8,
        "--vocabulary-size",
        260,
    ),
    "add": ("add", "CASE/db", "BASE/more.jsonl"),
    "remove": ("remove", "CASE/db", "--document", 3, "--document", 4),
    "compact": ("compact", "CASE/db"),
    "train": (
        "train",
        "BASE/plain",
        "-o",
        "CASE/run",
        *SIZES,
        "--steps",
        2,
        "--checkpoint-every",
        1,
        "--eval-every",
        1,
    ),
    "evaluate": (
        "evaluate",
        CHECKPOINT,
        "BASE/plain",
        "-o",
        "CASE/ev",
        "--sequence-length",
        16,
        "--stride",
        8,
        "--limit",
        3,
    ),
    "inspect": ("inspect", CHECKPOINT, "BASE/plain", "--file", "BASE/text.txt", "-o", "CASE/page.html"),
    "sample": ("sample", CHECKPOINT, "BASE/plain", "--length", 9, "--page", "CASE/page.html"),
}
TRIED = os.environ.get("RETRO_NP_TRIED_OPERATIONS", "2")  # operations of a command; `all` takes an hour
HOW = ("SIGKILL", "short write", "EIO", "ENOSPC")
QUICK = [(command, HOW[number % 4]) for number, command in enumerate(COMMANDS)]  # one disturbance of one operation each
ALL = [pytest.param(command, how, marks=pytest.mark.slow) for command in COMMANDS for how in HOW]


class Disturbance:
    """Counts the operations on files, in this process and in forked ones, and disturbs one of them."""

    def __init__(self, monkeypatch):
        self._shared = mmap.mmap(-1, 8)
        self.target, self.how = 0, ""
        for name in ("replace", "unlink", "rmdir", "mkdir", "fsync"):
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))
        opened, disturbance = Path.open, self

        class Writer(io.BufferedWriter):
            def write(self, data):
                return disturbance._operate(super().write, data)

        def open_counted(path, mode="r", *arguments, **options):
            if mode != "wb":
                return opened(path, mode, *arguments, **options)
            return Writer(disturbance._operate(io.FileIO, path, "w"))

        monkeypatch.setattr(Path, "open", open_counted)

    @property
    def count(self) -> int:
        return int.from_bytes(self._shared[:8], "little")

    def at(self, target: int, how: str) -> None:
        """Disturb the operation of this number, counted from 1; none if it is 0."""
        self.target, self.how = target, how
        self._shared[:8] = bytes(8)

    def _counted(self, change):
        return lambda *arguments, **options: self._operate(change, *arguments, **options)

    def _operate(self, change, *arguments, **options):
        self._shared[:8] = (self.count + 1).to_bytes(8, "little")
        if self.count == self.target:
            if self.how in ("EIO", "ENOSPC"):
                raise OSError(getattr(errno, self.how), os.strerror(getattr(errno, self.how)))
            if self.how == "short write" and change.__name__ == "write":
                change(arguments[0][: len(arguments[0]) // 2])
                change.__self__.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return change(*arguments, **options)


@pytest.fixture
def disturbance(monkeypatch):
    threads.use_threads(1)  # Threads do not survive a fork.
    return Disturbance(monkeypatch)


@pytest.fixture
def yard(tmp_path):
    """Where forked commands run."""
    for name in ("case/cwd", "cache"):
        (tmp_path / name).mkdir(parents=True)
    return SimpleNamespace(case=tmp_path / "case", cache=tmp_path / "cache")


def arguments_of(command, base, yard):
    (base / "text.txt").write_text("word1 is 2 word2 is 3 " * 3)
    return [str(part).replace("BASE", str(base)).replace("CASE", str(yard.case)) for part in COMMANDS[command]]


def lay_out(base, yard):
    """The state before the command: a database that edits may change."""
    for path in yard.case.iterdir():
        if path.name != "cwd":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(base / "plain", yard.case / "db")


@pytest.mark.parametrize(("command", "how"), ALL)
def test_a_command_disturbed_at_several_operations_says_so_and_its_next_run_ends_in_the_same_bytes(
    command, how, base, yard, disturbance
):
    disturb(command, how, base, yard, disturbance)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "how"), QUICK)
def test_a_command_disturbed_halfway_says_so_and_its_next_run_ends_in_the_same_bytes(
    command, how, base, yard, disturbance
):
    disturb(command, how, base, yard, disturbance, only_halfway=True)


def disturb(command, how, base, yard, disturbance, only_halfway=False):
    """Disturb each operation of a command, or the one in the middle, and run the command again."""
    arguments = arguments_of(command, base, yard)
    lay_out(base, yard)
    disturbance.at(0, "")
    status, _, err = run_forked(arguments, "plain", yard)
    assert status == 0, err
    expected, total = all_bytes(yard.case), disturbance.count
    assert total >= 3
    step = 1 if TRIED == "all" else max(1, total // int(TRIED))
    for number in [total // 2] if only_halfway else range(1, total + 1, step):
        lay_out(base, yard)
        disturbance.at(number, how)
        status, _, err = run_forked(arguments, "plain", yard)
        if how in ("EIO", "ENOSPC"):
            assert status in (0, 2), (number, status, err)
            faults = [line for line in err.splitlines() if not line.endswith("tokens/s")]  # the last line of `sample`
            assert len(faults) == (status == 2), (number, err)
            assert status == 2 or all_bytes(yard.case) == expected, (
                number,
                "success, but files are missing or left over",
            )
        else:
            if disturbance.count < number:  # The first run also filled caches.
                continue
            assert status == -signal.SIGKILL, (number, err)
        disturbance.at(0, "")
        status, _, err = run_forked(arguments, "plain", yard)
        assert status == 0, (number, err)
        assert all_bytes(yard.case) == expected, number


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unlink", "rmdir"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_build_that_cannot_tidy_up_does_not_report_success(name, code, base, yard, monkeypatch):
    """Every removal fails, from the first, from the second … on, until the build needs no more of them."""
    threads.use_threads(1)
    arguments = arguments_of("build", base, yard)
    lay_out(base, yard)
    assert run_forked(arguments, "plain", yard)[0] == 0
    expected, remove = all_bytes(yard.case), getattr(os, name)
    for first in itertools.count(0, 9):
        lay_out(base, yard)
        calls = iter(range(10**6))

        def fails(*paths, first=first, calls=calls, **options):
            if next(calls) >= first:
                raise OSError(code, os.strerror(code))
            return remove(*paths, **options)

        monkeypatch.setattr(os, name, fails)
        status, _, err = run_forked(arguments, "plain", yard)
        monkeypatch.setattr(os, name, remove)
        complete = all_bytes(yard.case) == expected and not (yard.case / "new" / "work").exists()
        assert (status == 0) == complete, (first, err)
        if status == 0:
            break
        assert status == 2
        assert len(err.splitlines()) == 1, err
        assert run_forked(arguments, "plain", yard)[0] == 0
        assert all_bytes(yard.case) == expected
        assert not (yard.case / "new" / "work").exists()
    assert first > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 9))])
def test_ctrl_c_pressed_several_times_at_random_moments_is_no_worse_than_once(seed, base, tmp_path):
    """Each press comes while the first is being handled, or a step, a checkpoint or an evaluation is under way."""
    # A process that ignores the signal, such as one in the background, starts processes that ignore it as well.
    listening = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    rng, program = random.Random(seed), [sys.executable, "-c", listening + "from retro_np.cli import main; main()"]
    often = ["--steps", "150", "--checkpoint-every", "1", "--eval-every", "2", "--eval-chunks", "2"]

    def start(out):
        command = [*program, "train", base / "plain", "-o", out, *SIZES, *often]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def steps():
        log = tmp_path / "pressed" / "log.jsonl"
        return len(log.read_bytes().splitlines()) if log.exists() else 0

    for _ in range(3):
        process, before = start(tmp_path / "pressed"), steps()
        while process.poll() is None and steps() <= before:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        for _ in range(rng.randint(2, 6)):
            process.send_signal(signal.SIGINT)  # does nothing if the process has ended
            time.sleep(rng.random() * rng.choice([0.001, 0.01, 0.05]))
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        *progress, last = err.splitlines()
        assert last == "retro-np: interrupted; run the same command to resume"
        assert [line for line in progress if not line.startswith("training: ")] == []
        assert [path.name for path in (tmp_path / "pressed").iterdir() if "partial" in path.name] == []
    assert start(tmp_path / "pressed").wait(timeout=120) == start(tmp_path / "whole").wait(timeout=120) == 0
    assert all_bytes(tmp_path / "pressed") == all_bytes(tmp_path / "whole")
