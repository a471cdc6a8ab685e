"""Ctrl-C, once or often, ends a command with one line and leaves what can be resumed.

Ground truth: processes that get real signals, and the bytes that the same command writes without them.
"""

import signal
import subprocess
import sys
import time

import pytest
from support import SMALL, all_bytes, write_corpus

from retro_np.retrieval.build import build_database

MAIN = "from retro_np.cli import main; print('ready', flush=True); main()"
# Each flush to the disk and each removal of a file sends two more signals.
SIGNALS_WHILE_TIDYING_UP = """
import os, signal
def signalling(call):
    def signalled(*arguments, **options):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        return call(*arguments, **options)
    return signalled
os.fsync, os.unlink = signalling(os.fsync), signalling(os.unlink)
"""
SIGNALS_AT_THE_END = """
import os, signal
from retro_np import cli
def run(arguments):
    raise KeyboardInterrupt
def flush(stream, flush=cli._flush):
    os.kill(os.getpid(), signal.SIGINT)
    return flush(stream)
cli.run, cli._flush = run, flush
"""
SWALLOWED = """
import os, signal
from retro_np import cli
def run(arguments):
    for _ in range(2):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            print("swallowed", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
cli.run = run
"""
IN_A_DESTRUCTOR = """
import os, signal, time
from retro_np import cli
class Interrupted:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
def run(arguments):
    Interrupted()
    time.sleep(60)
cli.run = run
"""
LINE = "retro-np: interrupted; run the same command to resume"
RETRO = ["--d-model", "16", "--n-heads", "1", "--d-head", "16", "--n-layers", "2", "--cca-layers", "2"]
COMMANDS = {
    "train": ["train", "{db}", "-o", "{new}", *RETRO, "--steps", "100000", "--sequence-length", "32"],
    "build": ["build", "{docs}", "-o", "{new}", "--chunk-size", "8", "--vocabulary-size", "300"],
    "demo": ["demo", "--from-scratch", "-o", "{new}"],
    "gradcheck": ["gradcheck"],
}


def start(program, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # Background jobs ignore it.
    )  # fmt: skip


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupts")
    docs = write_corpus(folder / "docs", 40)
    return {"docs": docs, "db": build_database(docs, folder / "db", SMALL, "hashing").path}


@pytest.mark.slow
@pytest.mark.parametrize("signals", [1, 2, 12])
@pytest.mark.parametrize("name", COMMANDS)
def test_any_number_of_signals_ends_in_status_130_and_one_line(name, signals, paths, tmp_path):
    process = start(MAIN, *(part.format(**paths, new=tmp_path / "new") for part in COMMANDS[name]))
    assert process.stdout.readline() == "ready\n"
    time.sleep(1.5)
    for _ in range(signals):
        process.send_signal(signal.SIGINT)
        time.sleep(0.03)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert [line for line in err.splitlines() if line.startswith("retro-np: ")] == [LINE]
    assert err.splitlines()[-1] == LINE
    assert "Traceback" not in err
    assert "ignored" not in err


@pytest.mark.slow
def test_signals_during_the_tidying_up_leave_no_half_file_and_the_next_build_has_the_same_bytes(paths, tmp_path):
    arguments = ["build", paths["docs"], "-o", tmp_path / "db", "--embedder", "hashing", "--vocabulary-size", "300"]
    process = start(SIGNALS_WHILE_TIDYING_UP + MAIN, *arguments)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, LINE + "\n")
    assert not list(tmp_path.rglob("*.partial"))
    arguments[3] = tmp_path / "unbroken"
    for out in ("db", "unbroken"):
        assert start(MAIN, *arguments[:3], tmp_path / out, *arguments[4:]).wait(timeout=60) == 0
    assert all_bytes(tmp_path / "db") == all_bytes(tmp_path / "unbroken")


def test_a_signal_while_the_last_line_is_written_changes_nothing():
    process = start(SIGNALS_AT_THE_END + MAIN)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, LINE + "\n")


def test_a_signal_that_was_swallowed_does_not_make_the_command_deaf():
    """Compilers and callbacks of other packages may swallow a KeyboardInterrupt."""
    process = start(SWALLOWED + MAIN)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, LINE + "\n")
    assert out.count("swallowed") == 2


def test_a_signal_in_a_destructor_still_ends_the_command():
    process = start(IN_A_DESTRUCTOR + MAIN)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, LINE + "\n")


def test_a_background_job_that_ignores_interrupts_still_does():
    program = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + MAIN
    process = start(program, "gradcheck", "rms_norm")
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0
