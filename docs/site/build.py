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

import nbformat
from links import problems
from sphinx.cmd.build import build_main

import retro_np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGES = ("*.md", "docs/*.md", "csrc/README.md", "retro_np/pretrained/*/README.md", "tutorials/README.md")
PICTURES = ("docs/*.png", "docs/landing/*.svg", "docs/experiments/*")
NOTEBOOKS = "tutorials/[0-9][0-9]_*.ipynb"
MATHJAX = "3.2.2"
INTEGRITY = (
    "Bt+SSVU8eBG27zChVewOicYs7Xsdt40qm4+UpHyX7k0/O9NliPc+x77k1/FEsPsjKPZGJvtRZM1vO+geW0OhGw=="  # SHA-512, from npm
)
READING = re.compile(r"^\*Reading: about (\d+) minutes · runs in (.+?) · needs (.+?)\.?\*$", re.MULTILINE)
CAPTION = re.compile(r"\A\*Figure [^*]+\*.*", re.DOTALL)
PATHS = {"understand": ("00", "01", "04", "05", "07", "08"), "build": ("00", "03", "04", "05", "06", "07")}

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

    Returns a dict from each tutorial's number to its file, title, minutes, running time and needs."""
    tutorials = {}
    for path in sorted(ROOT.glob(NOTEBOOKS)):
        notebook = nbformat.read(path, as_version=4)
        notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "python"}
        for cell, after in zip(notebook.cells, [*notebook.cells[1:], None], strict=True):
            caption = CAPTION.match(after.source) if after and after.cell_type == "markdown" else None
            if caption and cell.cell_type == "code":
                cell.metadata["mystnb"] = {"image": {"alt": plain(caption[0].split("\n\n")[0])}}
            elif cell.cell_type == "code":
                cell.metadata["mystnb"] = {"image": {"alt": "A figure that the cell above draws"}}
        for cell in notebook.cells:
            if cell.cell_type == "markdown" and CAPTION.match(cell.source):
                cell.source = "{.caption}\n" + cell.source
        nbformat.write(notebook, work / "tutorials" / path.name)
        first = notebook.cells[0].source
        reading = READING.search(first)
        if not reading:
            print(f"{path.name}: the first cell has no line '*Reading: about … minutes · runs in … · needs ….*'")
        title = re.search(r"^# (.*)", first, re.MULTILINE)[1]
        tutorials[path.name[:2]] = (path.name, title, *(reading.groups() if reading else ("0", "", "")))
    return tutorials


def plain(markdown):
    """The words of a caption, without what marks emphasis, code, formulas and links."""
    return re.sub(
        r"\s+", " ", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", markdown).translate(str.maketrans("", "", "*`$"))
    ).strip()


def contents(tutorials):
    """The page of contents: book.md with its tables filled in from the notebooks' first cells."""
    text = (HERE / "book.md").read_text("utf-8")
    for name, numbers in PATHS.items():
        steps = [tutorials[number] for number in numbers if number in tutorials]
        hours = sum(int(step[2]) for step in steps) / 60
        lines = [
            f"{i}. [{title}](tutorials/{file}), {minutes} minutes"
            for i, (file, title, minutes, *_) in enumerate(steps, 1)
        ]
        text = text.replace(f"<!-- {name} -->", "\n".join(lines)).replace(f"<!-- {name}: hours -->", f"{hours:.0f}")
    rows = [
        f"| [{title}](tutorials/{file}) | {minutes} minutes | {runs.removesuffix(' on one core')} | {needs} |"
        for file, title, minutes, runs, needs in tutorials.values()
    ]
    text = text.replace("<!-- tutorials -->", "\n".join(rows))
    toc = [f"tutorials/{file.removesuffix('.ipynb')}" for file, *_ in tutorials.values()]
    return text.replace("<!-- toctree -->", "\n".join(toc))


def reference(work):
    """The pages of the package's reference: one for each group of names, and one for each module of retro_np.nn."""
    api = work / "api"
    api.mkdir()
    for group, names in API.items():
        kinds = [(name, "class" if isinstance(getattr(retro_np, name), type) else "function") for name in names.split()]
        blocks = [f".. auto{kind}:: retro_np.{name}\n" + "   :members:\n" * (kind == "class") for name, kind in kinds]
        (api / f"{group.lower()}.rst").write_text(f"{group}\n{'=' * len(group)}\n\n" + "\n".join(blocks))
    nn = sorted(path.stem for path in Path(retro_np.__file__).parent.glob("nn/[a-z]*.py"))
    for name in ["retro_np.reference", *(f"retro_np.nn.{module}" for module in nn)]:
        title = name.removeprefix("retro_np.")
        text = f"{title}\n{'=' * len(title)}\n\n.. automodule:: {name}\n   :members:\n"
        (api / f"{title}.rst").write_text(text)

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
                sys.exit(f"build.py: MathJax can be had neither by npm nor from {url} ({error}); put it at {archive}")
    data = archive.read_bytes()
    if base64.b64encode(hashlib.sha512(data).digest()).decode() != INTEGRITY:
        sys.exit(f"build.py: {archive} is not MathJax {MATHJAX} as npm knows it; delete it and build again")
    folder = static / "mathjax"
    folder.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in ("es5/tex-svg.js", "LICENSE"):
            (folder / Path(member).name).write_bytes(tar.extractfile(f"package/{member}").read())


def build(out):
    """Build the book in the folder `out`. Returns sentences about what is wrong with it."""
    if out.exists() and any(out.iterdir()):
        if not (out / "book.html").exists():
            sys.exit(f"build.py: {out} is not empty and not a book; give another folder")
        shutil.rmtree(out)
    with tempfile.TemporaryDirectory() as temporary:
        work, static = Path(temporary, "book"), Path(temporary, "static")
        copy_pages(work)
        tutorials = copy_notebooks(work)
        (work / "book.md").write_text(contents(tutorials), "utf-8")
        (work / "tutorials" / "mini_retro.md").write_text((HERE / "mini_retro.md").read_text("utf-8"), "utf-8")
        shutil.copy(ROOT / "tutorials" / "mini_retro.py", work / "tutorials")
        reference(work)
        mathjax(static)
        options = ["-q", "-E", "-W", "--keep-going", "-c", HERE, "-d", Path(temporary, "doctrees")]
        options += ["-D", f"html_static_path={HERE / 'static'},{static}", work, out]
        failed = build_main([*map(str, options)])
    if (landing := HERE.parent / "landing" / "make.py").is_file():
        subprocess.run([sys.executable, landing, out], check=True)
    return ["Sphinx found the errors above"] * bool(failed) + problems(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "out", nargs="?", type=Path, default=ROOT / "build" / "book", help="the site's folder (build/book)"
    )
    sys.exit("\n".join(build(parser.parse_args().out.resolve())))
