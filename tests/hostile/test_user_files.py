"""No command changes a file that the user made. Ground truth: the bytes, names and times of all files before it."""

import contextlib
import fcntl
import os
import shutil
from pathlib import Path

import pytest
from hostile.commands import SIZES

from retro_np.cli import run
from retro_np.errors import UserError
from retro_np.experiments import demo, lab, pretrained
from retro_np.files import temporary_name
from retro_np.retrieval import stages

EVALUATE = ("--sequence-length", 16, "--stride", 8, "--limit", 3)
# Each command that writes into a folder; `{}` is the folder.
FOLDER_COMMANDS = {
    "build": (
        "build",
        "BASE/plain.jsonl",
        "-o",
        "OUT",
        "--embedder",
        "hashing",
        "--d-key",
        8,
        "--vocabulary-size",
        260,
    ),
    "train": ("train", "BASE/plain", "-o", "OUT", *SIZES, "--steps", 1),
    "evaluate": ("evaluate", "BASE/run/checkpoint.safetensors", "BASE/plain", "-o", "OUT", *EVALUATE),
    "demo": ("demo", "-o", "OUT", "--minutes", 0.5),
    "experiment": ("experiment", "neighbours", "-o", "OUT", "--scale", "tiny"),
    "pretrain": ("pretrain", "-o", "OUT", "--scale", "tiny"),
}
# Files of the user's that have a name which some command writes, or which looks like a leftover.
NAMED_LIKE_OURS = {
    "build": (
        "build.json",
        "manifest.json",
        "tokenizer.json",
        "documents.jsonl",
        "shards/00000/keys.npy",
        "work/texts.json",
    ),
    "train": ("config.json", "log.jsonl", "checkpoint.safetensors"),
    "evaluate": ("results.json", "losses.npz", "tokens.npz", "bpb_alpha.png"),
    "demo": ("plan.json", "results.json", "samples.html", "inspect.html", "db/notes.txt", "retro/config.json"),
    "experiment": ("tiny/neighbours.json", "tiny/notes.txt", "tiny/models/x/config.json"),
    "pretrain": ("tiny/pretrained/tokenizer.json", "tiny/pretrained/retro.safetensors"),
}
UNRELATED = ("notes.txt", "deep/er/notes.txt")
LEFTOVERS = (
    ".lock", "x.partial", "deep/er/x.partial", "work/x.partial", "edit/x.partial", "work/draft.txt", "edit/photo.raw",
    "shards/x.partial", "checkpoint.safetensors.0123.partial", "config.json.partial", "tiny/x.partial",
    "tiny/models/x.partial",
)  # fmt: skip


class Begun(Exception):
    """A long command began its work."""


@pytest.fixture
def long_commands_stop(monkeypatch):
    """The demo and the experiments stop where they would start to build a database."""

    def begin(*arguments, **options):
        raise Begun

    for module in (demo, lab, pretrained):
        monkeypatch.setattr(module, "build_database", begin)


def write(folder: Path, *names: str) -> list[Path]:
    """Write files of the user's."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"{name} of mine".encode())
        os.utime(folder / name, ns=(10**18, 10**18))
    return [folder / name for name in names]


def tree(folder: Path) -> dict[str, tuple]:
    """Each file and folder below a folder, with its bytes and its time of change."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in [folder, *folder.rglob("*")]
    }


def bytes_of(paths) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


def call(command: str, out: Path, base: Path) -> bool:
    """Run a command. Returns whether it was refused."""
    arguments = [str(part).replace("BASE", str(base)) for part in FOLDER_COMMANDS[command]]
    arguments = [str(out) if part == "OUT" else part for part in arguments]
    try:
        with contextlib.suppress(Begun):
            run(arguments)
    except (UserError, OSError):
        return True
    return False


def assert_refused_before_any_change(command: str, names: list[str], base: Path, folder: Path) -> None:
    """The command refuses an output folder that holds these files of the user's."""
    write(folder / "out", *names)
    before = tree(folder)
    assert call(command, folder / "out", base)
    assert tree(folder) == before


@pytest.mark.usefixtures("long_commands_stop")
@pytest.mark.parametrize(("command", "name"), [(c, n) for c, names in NAMED_LIKE_OURS.items() for n in names])
def test_a_folder_with_a_file_of_the_users_that_is_named_like_ours_is_refused_before_any_change(
    command, name, base, tmp_path
):
    assert_refused_before_any_change(command, [name], base, tmp_path)


@pytest.mark.usefixtures("long_commands_stop")
@pytest.mark.parametrize("command", FOLDER_COMMANDS)
@pytest.mark.parametrize("other", FOLDER_COMMANDS)
def test_no_command_takes_the_users_files_for_those_of_another_command(command, other, base, tmp_path):
    assert_refused_before_any_change(command, [*NAMED_LIKE_OURS[other], *UNRELATED], base, tmp_path)


@pytest.mark.usefixtures("long_commands_stop")
@pytest.mark.parametrize("command", FOLDER_COMMANDS)
@pytest.mark.parametrize("name", LEFTOVERS)
def test_a_file_that_looks_like_a_leftover_keeps_its_bytes(command, name, base, tmp_path):
    files = write(tmp_path / "out", name)
    before, everything = bytes_of(files), tree(tmp_path)
    if call(command, tmp_path / "out", base):
        assert tree(tmp_path) == everything
    assert bytes_of(files) == before


@pytest.mark.parametrize("command", ["build", "train", "evaluate"])
def test_the_users_files_in_a_folder_that_is_ours_outlive_the_same_command(command, base, tmp_path):
    out = tmp_path / "out"
    assert not call(command, out, base)
    files = write(out, *UNRELATED, *(name for name in LEFTOVERS if name != ".lock"))
    before = bytes_of(files)
    call(command, out, base)
    assert bytes_of(files) == before


@pytest.mark.parametrize("command", ["add", "remove", "compact", "search", "verify"])
def test_the_users_files_in_a_database_outlive_every_command_on_it(command, base, tmp_path):
    db = shutil.copytree(base / "plain", tmp_path / "db")
    files = write(
        db,
        *UNRELATED,
        *(name for name in LEFTOVERS if name != ".lock"),
        "shards/00000/mine.txt",
        "neighbours/mine.partial",
    )
    before = bytes_of(files)
    rest = {"add": [base / "more.jsonl"], "remove": ["--document", 3], "search": ["word1"]}.get(command, [])
    with contextlib.suppress(UserError):
        run([command, str(db), *map(str, rest)])
    assert bytes_of(files) == before


@pytest.mark.parametrize("command", ["build", "train", "evaluate"])
def test_the_content_of_a_lock_file_of_the_users_is_kept(command, base, tmp_path):
    """An output folder's own lock file is empty."""
    [lock] = write(tmp_path / "out", ".lock")
    before = lock.read_bytes()
    call(command, tmp_path / "out", base)
    assert lock.read_bytes() == before


@pytest.mark.parametrize("place", ["sub/db", "work/db", "edit/db", "deep/er/db"])
@pytest.mark.parametrize("outer", ["run", "plain"])
def test_a_command_removes_nothing_of_a_build_in_progress_below_its_folder(outer, place, base, tmp_path):
    """The file that the inner build is writing is locked by this process."""
    out = shutil.copytree(base / outer, tmp_path / "out")
    inner = out / place
    for part in ("work/texts", "shards/00000"):
        (inner / part).mkdir(parents=True)
    (inner / "build.json").write_bytes((base / "plain" / "build.json").read_bytes())
    writing = [
        temporary_name(inner / name) for name in ("tokenizer.json", "work/texts/00000.jsonl", "shards/00000/keys.npy")
    ]
    for path in writing:
        path.write_bytes(b"half")
    before = bytes_of(writing)
    with contextlib.ExitStack() as stack:
        for path in writing[:2]:
            fcntl.flock(stack.enter_context(path.open("rb")), fcntl.LOCK_EX)
        with contextlib.suppress(UserError):
            if outer == "run":
                run(["train", str(base / "plain"), "-o", str(out), *SIZES, "--steps", "2", "--checkpoint-every", "1"])
            else:
                run(["remove", str(out), "--document", "3"])
    assert bytes_of(writing) == before


@pytest.mark.parametrize("outer", ["run", "plain"])
def test_a_command_changes_nothing_of_a_run_or_database_below_its_folder(outer, base, tmp_path):
    out = shutil.copytree(base / outer, tmp_path / "out")
    inner = [shutil.copytree(base / name, out / "inner" / name) for name in ("plain", "run")]
    for folder in inner:
        write(folder, "x.partial", "notes.txt")
    before = [tree(folder) for folder in inner]
    if outer == "run":
        run(["train", str(base / "plain"), "-o", str(out), *SIZES, "--steps", "2", "--checkpoint-every", "1"])
    else:
        run(["remove", str(out), "--document", "3"])
        run(["compact", str(out)])
    assert [tree(folder) for folder in inner] == before


def test_a_build_that_was_interrupted_resumes_beside_the_users_files(base, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "write_indexes", stopped)
        call("build", out, base)  # ends as an interrupted command does
    assert not (out / "manifest.json").exists()
    files = write(
        out, *UNRELATED, "work/draft.txt", "work/texts/mine.partial", "work/deep/er/notes.txt", "shards/00000/mine.npy"
    )
    before = bytes_of(files)
    assert not call("build", out, base)
    assert (out / "manifest.json").exists()
    assert bytes_of(files) == before


@pytest.mark.parametrize("command", ["inspect", "sample"])
def test_a_page_changes_nothing_but_its_own_file(command, base, tmp_path):
    folder = tmp_path / "pages"
    write(folder, "page.html.partial", "x.partial", f"page.html.{'0' * 32}.partial", ".lock", *UNRELATED)
    before = tree(folder)
    texts = {"inspect": ["word1 is 2", "-o"], "sample": ["--length", "9", "--page"]}[command]
    run([command, str(base / "run" / "checkpoint.safetensors"), str(base / "plain"), *texts, str(folder / "page.html")])
    after = tree(folder)
    assert after.pop("page.html")[1].startswith(b"<!")
    del after["."], before["."]  # The folder's time of change.
    assert after == before


@pytest.mark.parametrize("source", ["checkpoint", "manifest", "folder", "file in the database"])
@pytest.mark.parametrize("command", ["inspect", "sample"])
def test_a_page_overwrites_no_input(command, source, base, tmp_path):
    db, checkpoint = shutil.copytree(base / "plain", tmp_path / "db"), tmp_path / "m.safetensors"
    shutil.copy(base / "run" / "checkpoint.safetensors", checkpoint)
    page = {
        "checkpoint": checkpoint,
        "manifest": db / "manifest.json",
        "folder": db,
        "file in the database": db / "new.html",
    }[source]
    before = tree(tmp_path)
    texts = {"inspect": ["word1 is 2", "-o"], "sample": ["--length", "9", "--page"]}[command]
    with pytest.raises(UserError):
        run([command, str(checkpoint), str(db), *texts, str(page)])
    assert tree(tmp_path) == before


# Files of the user's with the names and keys of ours, and other contents.
ALMOST_OURS = {
    "train": {
        "config.json": '{"model": "gpt", "training": {"lr": 1}, "data": "x", "precious": 1}',
        "log.jsonl": '{"step": 1, "loss": 3.2, "mine": true}\n',
    },
    "evaluate": {"results.json": '{"models": 1, "sentence": 2, "settings": 3, "precious": 4}'},
    "build": {"build.json": '{"chunk_size": 8, "vocabulary_size": 9, "sources": []}'},
    "demo": {"plan.json": '{"minutes": 5, "seed": 0}'},
}


@pytest.mark.usefixtures("long_commands_stop")
@pytest.mark.parametrize(("command", "name"), [(c, n) for c, files in ALMOST_OURS.items() for n in files])
@pytest.mark.parametrize("beside", [None, "notes.txt"])
def test_a_file_with_keys_like_ours_is_not_ours(command, name, beside, base, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / name).write_text(ALMOST_OURS[command][name])
    if beside:
        write(folder, beside)
    before = tree(folder)
    assert call(command, folder, base)
    assert tree(folder) == before


@pytest.mark.parametrize("text", ["", '{"s', '{"step": 1'])
def test_an_empty_or_unfinished_log_alone_does_not_make_a_folder_ours(text, base, tmp_path):
    [notes] = write(tmp_path / "out", "notes.txt")
    (tmp_path / "out" / "log.jsonl").write_text(text)
    before = tree(tmp_path)
    assert call("train", notes.parent, base)
    assert tree(tmp_path) == before


def test_losses_of_ours_do_not_make_a_picture_of_the_users_ours(base, tmp_path):
    assert not call("evaluate", tmp_path / "out", base)
    (tmp_path / "out" / "results.json").unlink()
    write(tmp_path / "out", "bpb_alpha.png")
    before = tree(tmp_path / "out")
    assert call("evaluate", tmp_path / "out", base)
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["work", "edit"])
@pytest.mark.parametrize("command", ["build", "add", "remove", "compact"])
def test_a_database_in_a_temporary_folder_of_another_one_is_left_alone(command, name, base, tmp_path):
    db = shutil.copytree(base / "plain", tmp_path / "db")
    shutil.copytree(base / "plain", db / name)
    if command == "build":
        (db / "manifest.json").unlink()
    before = tree(db / name)
    rest = {"add": [base / "more.jsonl"], "remove": ["--document", 3]}.get(command, [])
    if command == "build":
        assert call("build", db, base)
    else:
        with pytest.raises(UserError):
            run([command, str(db), *map(str, rest)])
    assert tree(db / name) == before


@pytest.mark.parametrize("name", ["work/run", "edit/x/run"])
def test_a_run_in_a_temporary_folder_of_a_database_keeps_files_with_names_of_ours(name, base, tmp_path):
    db = shutil.copytree(base / "plain", tmp_path / "db")
    run_folder = shutil.copytree(base / "run", db / name)
    write(run_folder, "tokenizer.json", "keys.npy", "00000.jsonl")
    before = tree(run_folder)
    with contextlib.suppress(UserError):
        run(["remove", str(db), "--document", "3"])
        run(["compact", str(db)])
    assert tree(run_folder) == before


@pytest.mark.parametrize("command", ["build", "train", "evaluate"])
@pytest.mark.parametrize("name", ["work/new", "edit/new", "shards/new", "neighbours/a/b"])
def test_no_output_is_put_into_a_folder_that_a_database_tidies(command, name, base, tmp_path):
    db = shutil.copytree(base / "plain", tmp_path / "db")
    before = tree(db)
    assert call(command, db / name, base)
    assert tree(db) == before


def test_a_build_with_another_request_is_refused_before_any_change(base, tmp_path):
    write(tmp_path / "out", "documents.jsonl", "notes.txt")
    shutil.copy(base / "plain" / "build.json", tmp_path / "out")
    before = tree(tmp_path / "out")
    assert call("build", tmp_path / "out", base)
    assert tree(tmp_path / "out") == before


def test_a_run_without_its_checkpoint_is_not_replaced_by_another_run(base, tmp_path):
    out = shutil.copytree(base / "run", tmp_path / "run")
    (out / "checkpoint.safetensors").unlink()
    before = bytes_of([out / "config.json", out / "log.jsonl"])
    with pytest.raises(UserError, match="was trained with steps = "):
        run(["train", str(base / "plain"), "-o", str(out), *map(str, SIZES), "--steps", "77"])
    assert bytes_of([out / "config.json", out / "log.jsonl"]) == before


def test_a_run_without_its_settings_is_refused_by_the_name_of_the_missing_file(base, tmp_path):
    out = shutil.copytree(base / "run", tmp_path / "run")
    (out / "config.json").unlink()
    (out / "log.jsonl").write_text("")  # as a run of no steps leaves it
    before = tree(out)
    with pytest.raises(UserError, match=r"run/config\.json is missing, so log\.jsonl may not be of a training run"):
        run(["train", str(base / "plain"), "-o", str(out), *map(str, SIZES), "--steps", "1"])
    assert tree(out) == before
