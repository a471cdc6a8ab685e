"""Whose folder is it? A command writes into a folder only if the folder is new or empty, or if the command made it.

An output is recognised by what certain files contain, its marks, not by their names. Older versions wrote the same."""

import os
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retro_np.errors import UserError
from retro_np.files import MARKS, check_folder, visible
from retro_np.files.untrusted import parse_json, read_safetensors

MAX_MARK_BYTES = 1 << 26  # A larger JSON file is not a mark.
# In the folder of a scale; older versions wrote the page.
LAB_FOLDERS = {"databases", "models", "scores", "corpora", "pretrained", "samples.html"}

Mark = Callable[[Path], bool]  # whether a file is what one of our commands writes under its name


@dataclass(frozen=True)
class Kind:
    """An output. marks: name → whether the file of that name is ours.

    others: further files, which count as ours if the first mark is there, or if they look so themselves."""

    name: str
    marks: dict[str, Mark]
    others: dict[str, Mark] = field(default_factory=dict)
    shares: "Kind | None" = None  # the command may also write into the folders of this kind
    folders: tuple[str, ...] = ()  # subfolders in which the command writes and removes files


def has_keys(*keys: str, **inner: tuple[str, ...]) -> Mark:
    """The mark of a file whose content has these keys. inner: keys of objects in it, by their names."""

    def is_ours(path: Path) -> bool:
        content = _content(path)
        objects = [(content, keys), *((content.get(name), names) for name, names in inner.items())]
        return all(isinstance(value, dict) and set(names) <= value.keys() for value, names in objects)

    return is_ours


def _content(path: Path) -> dict[str, Any]:
    """The JSON object in a file or in a log's first line, the metadata of tensors, or an archive's names of arrays."""
    if path.suffix == ".safetensors":
        return dict(read_safetensors(path, lambda name: False)[1])
    with path.open("rb") as file:
        if path.suffix == ".npz":
            return dict.fromkeys(zipfile.ZipFile(file).namelist())
        return parse_json((file.readline if path.suffix == ".jsonl" else file.read)(MAX_MARK_BYTES), str(path))


def _is_bundled(path: Path) -> bool:
    return parse_json(_content(path).get("retro_np", ""), str(path)).keys() - {"trained_on"} == {"config", "run"}


def _is_lab(path: Path) -> bool:
    if not path.is_dir() or not {p.name for p in visible(path) if p.suffix not in (".json", ".png")} <= LAB_FOLDERS:
        return False
    stored = [(p, kind) for kind, name in ((DATABASE, "databases"), (RUN, "models")) for p in (path / name).glob("*")]
    stored.append((path / "pretrained", PRETRAINED))
    return all(_made(p, kind) or not any(visible(p)) for p, kind in stored if p.is_dir())


DATABASE_FOLDERS = ("shards", "splits", "neighbours", "work", "edit")
DATABASE_MARKS = {"build.json": has_keys("chunk_size", "vocabulary_size", "sources", "held_out", "key_dtype")}
DATABASE = Kind("database", DATABASE_MARKS, folders=DATABASE_FOLDERS)
RUN_CONFIG = has_keys(model=("vocabulary_size", "cca_layers"), training=("sequence_length",), data=("tokenizer",))
RUN_MARKS = {"config.json": RUN_CONFIG, "checkpoint.safetensors": has_keys("retro_np")}
RUN_LOG = has_keys("step", "loss", "learning_rate", "gradient_norm")
RUN = Kind("training run", RUN_MARKS, {"log.jsonl": RUN_LOG, "best.safetensors": has_keys("retro_np")})
DEMO = Kind("demo", {"plan.json": has_keys("seed", "limit_bytes", "evaluated_chunks")})
RESULTS = has_keys("models", "sentence", "alphas", "bpb_alpha", settings=("split", "stride"))
BY_CHUNK = has_keys("r.npy", "bytes.npy", "documents.npy")
BY_TOKEN = has_keys("positions.npy", "tokens.npy", "documents.npy")
EVALUATION_MARKS = {"results.json": RESULTS, "losses.npz": BY_CHUNK, "tokens.npz": BY_TOKEN}
EVALUATION = Kind("evaluation", EVALUATION_MARKS, {"bpb_alpha.png": lambda path: False}, shares=DEMO)
MODELS = ("baseline.safetensors", "retro.safetensors")
PRETRAINED = Kind("bundle", dict.fromkeys(MODELS, _is_bundled), {"tokenizer.json": lambda path: False})
LAB = Kind("experiment", {"small": _is_lab, "tiny": _is_lab, "corpora": Path.is_dir})
KINDS = (DATABASE, RUN, DEMO, PRETRAINED, LAB, EVALUATION)  # An evaluation in the folder of another kind comes last.


def claim(folder: Path | str, kind: Kind) -> None:
    """Raise UserError unless a command may write its output into a folder. Changes nothing.

    It may if the folder is missing or empty, or holds a mark of the kind, no mark of a kind that comes before, and no
    other file with the name of a mark."""
    folder = Path(folder)
    check_folder(folder)
    check_subfolders(folder, kind.folders)
    real = Path(os.path.realpath(folder))
    for outer in real.parents:  # A command on that database would remove what it does not know.
        if real.relative_to(outer).parts[0] in DATABASE_FOLDERS and _made(outer, DATABASE):
            raise UserError(f"{folder} is inside the database {outer}: give another folder with -o")
    if not folder.is_dir() or not any(visible(folder)):
        return
    marks = {name: is_mark(folder / name, is_ours) for name, is_ours in kind.marks.items()}
    if damaged := [name for name, known in marks.items() if known is False]:
        fault = "is damaged, or was not written by this command"
        raise UserError(f"{folder / damaged[0]} {fault}: give another folder with -o")
    first = next(iter(marks))
    unknown = [name for name, looks_ours in kind.others.items() if is_mark(folder / name, looks_ours) is False]
    if unknown and not marks[first]:
        fault = f"{folder / first} is missing, so {unknown[0]} may not be of a {kind.name}"
        raise UserError(f"{fault}: put it back, or give another folder with -o")
    owner = next((other for other in KINDS if _made(folder, other)), None)
    if owner is None or owner not in (kind, kind.shares):
        held = f"a{'n' * (owner.name[0] == 'e')} {owner.name}" if owner else "other files"
        raise UserError(f"{folder} holds {held}: give a new folder for the {kind.name}")


def check_subfolders(folder: Path, subfolders: Iterable[str]) -> None:
    """Raise UserError if a subfolder is no folder, holds another output, or is or contains a link to a folder."""
    for name in subfolders:
        if os.path.lexists(folder / name) and not (folder / name).is_dir():
            raise UserError(f"{folder / name} is not a folder: remove it")
        if any((folder / name / mark).exists() for mark in MARKS):
            raise UserError(f"{folder / name} holds another database or run: move it elsewhere")
        for current, folders, _ in os.walk(folder / name):
            for path in (current, *(os.path.join(current, entry) for entry in folders)):
                if os.path.islink(path):
                    raise UserError(f"{path} is a link: put the folder itself in its place")


def _made(folder: Path, kind: Kind) -> bool:
    return any(is_mark(folder / name, is_ours) for name, is_ours in kind.marks.items())


def is_mark(path: Path, is_ours: Mark) -> bool | None:
    """Whether a file is a mark; None if there is no such file."""
    if not path.exists() and not path.is_symlink():
        return None
    try:
        return (path.is_file() or path.is_dir()) and is_ours(path)  # A pipe would be read for ever.
    except (UserError, OSError, zipfile.BadZipFile):
        return False
