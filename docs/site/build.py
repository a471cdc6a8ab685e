"""Build the book: python docs/site/build.py [OUT]

Needs `pip install -e ".[book]"`. Copies the pages and notebooks into a temporary folder, adds the contents and the
reference of the package, and calls Sphinx with warnings as errors. Then it adds the landing page and checks every link.
MathJax comes from npm the first time, and from ~/.cache/retro_np later.
"""

import argparse
import base64
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path

try:
    import nbformat
    from links import problems
    from sphinx.cmd.build import build_main

    import retro_np
except ModuleNotFoundError as error:
    sys.stderr.write(f'build.py: {error.name} is missing; install what the book needs: pip install -e ".[book]"\n')
    sys.exit(2)

MARK = (
    ".retro_np_book"  # in a book's folder: the names of its files, so that the next build removes these and no others
)
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGES = ("*.md", "docs/*.md", "csrc/README.md", "retro_np/pretrained/*/README.md", "tutorials/README.md")
PICTURES = ("docs/*.png", "docs/landing/*.svg", "docs/experiments/*")
NOTEBOOKS = "tutorials/[0-9][0-9]_*.ipynb"
MATHJAX = "3.2.2"
INTEGRITY = (
    "Bt+SSVU8eBG27zChVewOicYs7Xsdt40qm4+UpHyX7k0/O9NliPc+x77k1/FEsPsjKPZGJvtRZM1vO+geW0OhGw=="  # SHA-512, from npm
)
READING = re.compile(r"\*Reading: about (\d+) minutes · runs in ([^·*]+) · needs ([^*]+)\*")
CAPTION = re.compile(r"\A\*Figure \d+\.\d+\.\*.*?(?=\n\n|\Z)", re.DOTALL)
REMOTE_IMAGE = re.compile(r"!\[([^\]]*)\]\(https?:[^)]*\)")  # a badge, which becomes its words
# The tutorials of each path. One that is read in part has the first and the last section of each part, and "" is the
# page's beginning or end. Each of these pages says the same below its line of reading time.
UNDERSTAND: dict[str, list[tuple[str, str]]] = {
    "00": [("", "A decoder block"), ("Break it: without the mask", "What this model cannot know")],
    "01": [],
    "04": [("", "Four terms")],
    "05": [("", "The off-by-one")],
    "06": [("", "Algorithm 1")],
    "07": [("", "Does it know the names by heart?")],
    "08": [
        ("", "What the gain is made of"),
        ("The curve that tells", "The curve that tells"),
        ("This project's own headline", "This project's own headline"),
        ("When is a gain leakage?", "When is a gain leakage?"),
    ],
}
BUILD: dict[str, list[tuple[str, str]]] = {number: [] for number in ("00", "01", "03", "04", "05", "06", "07")}

# The public names, grouped by subject. `reference` is a module.
API = {
    "Model": "RetroConfig EncoderConfig DecoderConfig init_params count_parameters retro retro_loss hidden_states"
    " attention_maps generate",
    "Gradients": "gradcheck GradientError GradientReport",
    "Training": "TrainingConfig train retrofit adamw_init adamw_update",
    "Files": "save_params load_params load_pretrained load_bert",
    "Retrieval": "BuildConfig build_database Database",
    "Evaluation": "evaluate score score_tokens paired_bootstrap trained_on",
    "Errors": "UserError",
}


def copy_pages(work):
    """Copy pages and pictures into the folder that Sphinx reads, with the same relative paths."""
    for pattern in (*PAGES, *PICTURES):
        for path in ROOT.glob(pattern):
            target = work / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


def copy_notebooks(work):
    """Copy the notebooks. A figure takes its alternative text from its caption, the cell that follows.

    Returns what the contents say of each tutorial, by its number, and sentences about what is missing."""
    tutorials, missing = {}, []
    for path in sorted(ROOT.glob(NOTEBOOKS)):
        notebook = nbformat.read(path, as_version=4)
        notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "python"}
        caption = None  # the text below a cell, if it is a caption; figures one below the other share theirs
        for number, cell in reversed(list(enumerate(notebook.cells))):
            if cell.cell_type == "markdown":
                cell.source = REMOTE_IMAGE.sub(r"\1", cell.source)
                caption = CAPTION.match(cell.source)
                cell.source = "{.figure-caption}\n" * bool(caption) + cell.source
            elif any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
                if not caption:
                    missing.append(f"{path.name}: no caption '*Figure N.N.* …' follows the figure of cell {number}")
                cell.metadata["mystnb"] = {"image": {"alt": plain(caption[0] if caption else "a figure")}}
        nbformat.write(notebook, work / "tutorials" / path.name)
        first = notebook.cells[0].source
        reading = READING.search(first)
        if not reading:
            missing.append(
                f"{path.name}: no line '*Reading: about … minutes · runs in … · needs ….*' in the first cell"
            )
        minutes, runs, needs = reading.groups() if reading else ("0", "", "")
        tutorials[path.name[:2]] = {
            "title": f"[{re.search('^# (.*)', first, re.MULTILINE)[1]}](tutorials/{path.name})",
            "minutes": int(minutes),
            "runs": runs.removesuffix(" on one core"),
            "needs": re.sub(r"\s+", " ", needs).replace("](", "](tutorials/").split(". ")[0].rstrip("."),
            "exercises": sum("exercise" in cell.metadata.get("tags", []) for cell in notebook.cells),
            "text": "\n\n".join(c.source for c in notebook.cells if "hide-input" not in c.metadata.get("tags", [])),
        }
    return tutorials, missing


def plain(markdown):
    """The words of a caption, without what marks emphasis, code, formulas and links."""
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", markdown)
    words = re.sub(r"\\(?:mathrm|text|mathcal|operatorname)\{([^}]*)\}", r"\1", words)
    return re.sub(r"\s+", " ", re.sub(r"[*`${}]|\\(?=[a-zA-Z])", "", words)).strip()


def passage(tutorial, first, last):
    """A part of a tutorial: words that name it, with links to its first and last section, and its share of the text."""
    text, page = tutorial["text"], re.search(r"\((.*)\)", tutorial["title"])[1]
    begin, heading = (text.index(f"## {name}\n") if name else 0 for name in (first, last))
    following = re.search(r"^## ", text[heading + 3 :], re.MULTILINE)
    share = (heading + 3 + following.start() - begin) / len(text)

    def link(name):
        return f"[{name}]({page}#{re.sub(r'[^a-z0-9 -]', '', name.lower()).replace(' ', '-')})"

    if first == last:
        return link(last), share
    return f"{'from ' + link(first) + ' ' if first else ''}to the end of {link(last)}", share


def contents(tutorials):
    """The page of contents: book.md with its lists and its table filled in from the notebooks."""
    text = (HERE / "book.md").read_text("utf-8")
    hours = exercises = 0
    for name, path in {"understand": UNDERSTAND, "build": BUILD}.items():
        lines, minutes, exercises = [], 0, 0
        for number, parts in path.items():
            tutorial, read, length = tutorials[number], "", tutorials[number]["minutes"]
            if parts:
                passages = [passage(tutorial, *part) for part in parts]
                read = ": " + ", and ".join(words for words, _ in passages)
                length = max(5, 5 * round(length * sum(share for _, share in passages) / 5))
            lines.append(f"1. {tutorial['title']}, {length} minutes{read}")
            minutes, exercises = minutes + length, exercises + tutorial["exercises"]
        hours = round(minutes / 30) / 2
        text = text.replace(f"<!-- {name} -->", "\n".join(lines)).replace(f"<!-- {name}: hours -->", f"{hours:g}")
    text = text.replace("<!-- build: exercises -->", f"{exercises}")
    text = text.replace("<!-- build: all hours -->", f"{hours + 2:g}")  # The contents promise two hours for exercises.
    rows = [f"| {t['title']} | {t['minutes']} min | {t['runs']} | {t['needs']} |" for t in tutorials.values()]
    toc = [re.search(r"\((.*)\.ipynb\)", t["title"])[1] for t in tutorials.values()]
    return text.replace("<!-- tutorials -->", "\n".join(rows)).replace("<!-- toctree -->", "\n".join(toc))


def reference(work):
    """The pages of the package's reference: one for each group of names, and one for each module of retro_np.nn."""
    api = work / "api"
    api.mkdir()
    for group, names in API.items():
        kinds = [(name, "class" if isinstance(getattr(retro_np, name), type) else "function") for name in names.split()]
        blocks = [f".. auto{kind}:: retro_np.{name}\n" + "   :members:\n" * (kind == "class") for name, kind in kinds]
        (api / f"{group.lower()}.rst").write_text(f"{group}\n{'=' * len(group)}\n\n" + "\n".join(blocks))
    nn = sorted(path.stem for path in Path(retro_np.__file__).parent.glob("nn/[a-z]*.py"))
    names = ["retro_np.reference", *(f"retro_np.nn.{module}" for module in nn), "retro_np.training.memory"]
    files = {name: name.removeprefix("retro_np.") for name in names}
    files["retro_np.errors"] = "module.errors"  # errors.rst is that of a group of names
    for name, file in files.items():
        title = name.removeprefix("retro_np.")
        text = f"{title}\n{'=' * len(title)}\n\n.. automodule:: {name}\n   :members:\n"
        (api / f"{file}.rst").write_text(text)

    def described(name):
        thing = getattr(retro_np, name)
        first = re.split(r"(?<=[.:])\s|\n", (thing.__doc__ or "").strip())[0]
        return f"| {{py:obj}}`~retro_np.{name}` | {first} |"

    tables = "\n\n".join(
        f"## {group}\n\n| | |\n| --- | --- |\n" + "\n".join(map(described, names.split()))
        for group, names in API.items()
    )
    text = (HERE / "api.md").read_text("utf-8").replace("<!-- names -->", tables)
    groups = "\n".join(group.lower() for group in API)
    modules = "\n".join(f"nn.{module}" for module in nn)
    (api / "index.md").write_text(text.replace("<!-- groups -->", groups), "utf-8")
    core = (HERE / "core.md").read_text("utf-8").replace("<!-- modules -->", modules)
    (api / "core.md").write_text(core, "utf-8")


def mathjax(static):
    """Put MathJax, one script with its fonts, into the site. Its archive is fetched once, and its hash is checked."""
    name = f"mathjax-{MATHJAX}.tgz"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retro_np"
    cache.mkdir(parents=True, exist_ok=True)
    archive = cache / name
    if not archive.is_file():
        try:
            subprocess.run(["npm", "pack", "--silent", f"mathjax@{MATHJAX}", "--pack-destination", cache], check=True,
                           stdout=subprocess.DEVNULL)  # fmt: skip
        except (OSError, subprocess.CalledProcessError):
            url = f"https://registry.npmjs.org/mathjax/-/{name}"
            try:
                with urllib.request.urlopen(url, timeout=60) as answer:
                    archive.write_bytes(answer.read())
            except OSError as error:
                stop(f"MathJax can be had neither by npm nor from {url} ({error}); put it at {archive}")
    data = archive.read_bytes()
    if base64.b64encode(hashlib.sha512(data).digest()).decode() != INTEGRITY:
        stop(f"{archive} is not MathJax {MATHJAX} as npm knows it; delete it and build again")
    folder = static / "mathjax"
    folder.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in ("es5/tex-svg.js", "LICENSE"):
            (folder / Path(member).name).write_bytes(tar.extractfile(f"package/{member}").read())


def stop(message):
    """End with a line that says what is wrong and what to do, and exit status 2."""
    sys.stderr.write(f"build.py: {message}\n")
    sys.exit(2)


def place(site, out):
    """Put the finished site where it belongs, in place of the files of the book that was there."""
    mark = out / MARK
    for name in mark.read_text("utf-8").splitlines() if mark.exists() else ():
        (out / name).unlink(missing_ok=True)
    names = sorted(path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file())
    shutil.copytree(site, out, dirs_exist_ok=True)
    mark.write_text("\n".join(names) + "\n", "utf-8")


def build(out):
    """Build the book in the folder `out`. Returns sentences about what is wrong with it."""
    if any(path.is_file() for path in (out, *out.parents)):
        stop(f"{out} cannot be a folder, since a file stands there; give another name")
    if out.exists() and any(out.iterdir()) and not (out / MARK).exists():
        stop(f"{out} is not empty and not a book; give another folder")
    with tempfile.TemporaryDirectory() as temporary:
        work, static, site = (Path(temporary, name) for name in ("book", "static", "site"))
        copy_pages(work)
        tutorials, missing = copy_notebooks(work)
        (work / "book.md").write_text(contents(tutorials), "utf-8")
        (work / "tutorials" / "mini_retro.md").write_text((HERE / "mini_retro.md").read_text("utf-8"), "utf-8")
        shutil.copy(ROOT / "tutorials" / "mini_retro.py", work / "tutorials")
        reference(work)
        mathjax(static)
        options = ["-q", "-E", "-W", "--keep-going", "-c", HERE, "-d", Path(temporary, "doctrees")]
        options += ["-D", f"html_static_path={HERE / 'static'},{static}", work, site]
        failed = build_main([*map(str, options)])
        subprocess.run([sys.executable, HERE.parent / "landing" / "make.py", site], check=True)
        wrong = missing + ["Sphinx found the errors above"] * bool(failed) + problems(site)
        place(site, out)
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "out", nargs="?", type=Path, default=ROOT / "build" / "book", help="the site's folder (build/book)"
    )
    sys.exit("\n".join(build(parser.parse_args().out.resolve())) or 0)
