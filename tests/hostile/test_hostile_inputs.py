"""Hostile inputs of the generators, and what the harness counts. The large run is benchmarks/reliability.py."""

import importlib
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from hostile import commands, databases, parsers, values

from retro_np import progress
from retro_np.errors import UserError
from retro_np.kernels import threads

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
reliability = importlib.import_module("reliability")
SEED = 20
# The number of inputs. Each test takes a few seconds with the first and ten times as long with the second.
PARSERS = [1000, pytest.param(20_000, marks=pytest.mark.slow)]
COMMANDS = [15, pytest.param(400, marks=pytest.mark.slow)]


@pytest.fixture
def one_thread(monkeypatch):
    threads.use_threads(1)  # The inputs run in forked processes, and threads do not survive a fork.
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


def figures(part, count, base, tmp_path):
    """What the benchmark saves about a part."""
    return reliability.figures_of(*reliability.run_part(part, SEED, 0, count, 2, base, tmp_path), count)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("count", PARSERS)
def test_no_hostile_input_ends_in_anything_but_a_user_error(count, base, tmp_path):
    row = figures("parsers", count, base, tmp_path)
    assert row["causes"] == []
    assert sum(row["kinds"].values()) == count


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("count", COMMANDS)
def test_no_command_with_a_hostile_input_fails_sends_or_loses_anything(count, base, tmp_path):
    row = figures("commands", count, base, tmp_path)
    assert row["causes"] == []
    assert sum(row["kinds"].values()) == count


def test_at_least_half_of_the_inputs_of_each_kind_get_past_hash_and_first_parser(base, tmp_path):
    world = parsers.World(base, tmp_path)
    for kind, (make, _) in parsers.PARSERS.items():
        if kind != "kernel":  # A kernel's input is past when it has run.
            assert np.mean([make(np.random.default_rng([SEED, n]), world)[0] for n in range(40)]) >= 0.5, kind


def test_an_input_is_determined_by_seed_and_number(base, tmp_path):
    worlds = [parsers.World(base, tmp_path / name) for name in "ab"]
    numbers = [
        n for n in range(2000) if parsers.kind_of(n) in ("manifest", "documents", "tokenizer", "checkpoint", "array")
    ][:30]
    for number in numbers:
        for world in worlds:
            parsers.case(SEED, number, world)
        names = {path.name for path in worlds[0].scratch.iterdir() if path.is_file()}
        assert all((worlds[0].scratch / name).read_bytes() == (worlds[1].scratch / name).read_bytes() for name in names)


def test_a_resealed_database_gets_past_its_hashes(base, tmp_path):
    """Files whose contents are valid, but other than those of the database that was built."""
    stored = databases.stored(base / "plain")
    lines = stored.files["documents.jsonl"].replace(b'"doc ', b'"document ')
    change = databases.with_file(np.random.default_rng(0), stored, "documents.jsonl", lines)
    path = databases.Folder(stored, tmp_path / "db").write(change)
    assert parsers.Database.open(path).documents[0]["name"].startswith("document ")


# What a worker does, and the kind of failure that it is. "plain" is a database's file names, "out" an output.
def raises(error):
    def worker(base, scratch, seed):
        def run(number):
            if number == 3:
                raise error
            return "kind", True, []

        return run

    return worker


def ends(how):
    def worker(base, scratch, seed):
        def run(number):
            if number == 3:
                how()
            return "kind", True, []

        return run

    return worker


@pytest.mark.parametrize(
    ("how", "failure"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "crash"), (lambda: os.kill(os.getpid(), signal.SIGABRT),
        "crash"),
        (lambda: signal.pause(), "time-out"), (lambda: os._exit(5), "crash"),
    ],
)  # fmt: skip
def test_a_worker_that_dies_or_hangs_is_counted_once_and_its_other_inputs_run(how, failure, tmp_path, monkeypatch):
    monkeypatch.setitem(reliability.WORKERS, "parsers", ends(how))
    monkeypatch.setitem(reliability.TIMEOUT, "parsers", 1.0)
    monkeypatch.setitem(reliability.BATCH, "parsers", 4)
    kinds, failures, _ = reliability.run_part("parsers", 0, 0, 10, 2, tmp_path, tmp_path)
    assert [(number, kind) for number, _, kind, _ in failures] == [(3, failure)]
    assert sum(kinds.values()) == 10


def test_a_generator_that_fails_ends_the_run(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(reliability.WORKERS, "parsers", raises(KeyError("generator")))
    with pytest.raises(SystemExit, match="the generator failed at input 3"):
        reliability.run_part("parsers", 0, 0, 10, 1, tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("call", "failure"), [(lambda: int("x"), "traceback"), (lambda: np.empty(2**60), "traceback"), (lambda: None, None)]
)
def test_exceptions_of_a_parser_other_than_user_errors_are_counted(call, failure, base, tmp_path, monkeypatch):
    monkeypatch.setattr(parsers, "case", lambda seed, number, world: ("kind", True, call))
    _, _, failures = reliability.parsers_worker(base, tmp_path / "scratch", 0)(0)
    assert [kind for kind, _ in failures] == ([failure] if failure else [])


def test_a_parser_that_unpickles_is_counted(base, tmp_path, monkeypatch):
    def case(seed, number, world):
        data = values.saved(np.array([values.Canary(world.canary)], object), allow_pickle=True)
        path = world.write("a.npy", data)
        return "kind", True, lambda: np.load(path, allow_pickle=True)

    monkeypatch.setattr(parsers, "case", case)
    _, _, failures = reliability.parsers_worker(base, tmp_path / "scratch", 0)(0)
    assert [kind for kind, _ in failures] == ["lost"]


@pytest.fixture
def yard(base, tmp_path):
    threads.use_threads(1)
    return commands.Yard(base, tmp_path)


def judged(yard, monkeypatch, body, mode="plain", outputs=()):
    """The kinds of failure when a command does what `body` does."""
    monkeypatch.setattr("retro_np.cli.run", lambda arguments: body() and None)
    case = commands.Command(["search", "x"], mode, outputs, "database", True)
    monkeypatch.setattr(
        commands, "command", lambda seed, number, yard: yard.lay_out() or (yard.database("plain") and case)
    )
    return {failure.kind for failure in commands.run_case(0, 0, yard)[1]}


def refuse(text):
    raise UserError(text)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "colour", "pty"])
@pytest.mark.parametrize("payload", values.PAYLOADS)
def test_a_payload_that_is_sent_is_counted_and_one_that_is_shown_is_not(mode, payload, yard, monkeypatch):
    assert judged(yard, monkeypatch, lambda: print(f"a{payload}b"), mode) == {"escape"}
    assert (
        judged(
            yard, monkeypatch, lambda: progress.safe_console(force_terminal=mode != "plain").print(f"a{payload}b"), mode
        )
        == set()
    )


BODIES = {
    "nothing": (lambda: None, set()),
    "a user error": (lambda: refuse("no"), set()),
    "an exception": (lambda: {}["x"], {"traceback"}),
    "another status": (lambda: os._exit(3), {"status"}),
    "two lines": (lambda: print("a", file=sys.stderr) or refuse("no"), {"several lines"}),
    "a crash": (lambda: os.kill(os.getpid(), signal.SIGSEGV), {"crash"}),
    "a changed file": (lambda: Path("../user/notes.txt").write_text("x"), {"lost"}),
    "a lost file": (lambda: Path("..", "user", "work", "draft.txt").unlink(), {"lost"}),
    "a new file in the database": (lambda: Path("../db/new").write_text("x"), {"lost"}),
    "a new file outside": (lambda: Path("new").write_text("x"), {"lost"}),
    "a user's file in the database": (lambda: Path("../db/shards/mine.partial").unlink(), {"lost"}),
}


@pytest.mark.parametrize("body", BODIES)
def test_what_a_command_may_not_do_is_counted(body, yard, monkeypatch):
    act, expected = BODIES[body]
    assert judged(yard, monkeypatch, act) == expected


def test_an_output_may_change_but_not_the_users_file_in_it(yard, monkeypatch):
    assert judged(yard, monkeypatch, lambda: Path("../db/new").write_text("x"), outputs=("db",)) == set()
    assert judged(yard, monkeypatch, lambda: Path("../db/notes of mine.txt").unlink(), outputs=("db",)) == {"lost"}


def test_a_command_that_hangs_is_counted(yard, monkeypatch):
    monkeypatch.setattr(
        commands, "run_forked", lambda *arguments, run=commands.run_forked: run(*arguments, timeout=0.5)
    )
    assert judged(yard, monkeypatch, signal.pause) == {"time-out"}
