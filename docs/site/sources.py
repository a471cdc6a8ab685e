"""Pages with the source of the package's files, and links to them.

A page may link a file, `[cca](../retro_np/nn/cca.py)`, as GitHub understands it, or name one in backticks,
`retro_np/nn/cca.py`. This Sphinx extension makes a page of each such file, with highlighted lines that
have anchors, and points both kinds of link there."""

import html
import inspect
import posixpath
import re
import sys
from pathlib import Path

from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import guess_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx import addnodes
from sphinx.transforms import SphinxTransform

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("retro_np", "csrc", "tests", "benchmarks", "tutorials", "docs", ".ci", ".github")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in")
TEXT = {".py", ".c", ".h", ".toml", ".yml", ".html", ".js", ".cff", ".in", ".md", ""}
PAGES_OF_THEIR_OWN = {"tutorials/mini_retro.py": "tutorials/mini_retro.html"}
STATIC = ("index.html",)  # the landing page, which Sphinx does not make

wanted = set()  # the files and folders that have a page


def page_of(path):
    """The address of a file's or a folder's page, from the root of the site; None if it has none."""
    file = ROOT / path
    if path in STATIC or path in PAGES_OF_THEIR_OWN:
        return PAGES_OF_THEIR_OWN.get(path, path)
    if path.startswith("..") or not (file.is_dir() or (file.is_file() and file.suffix in TEXT)):
        return None
    wanted.add(path)
    return f"source/{path}/index.html" if file.is_dir() else f"source/{path}.html"


class LinkFiles(SphinxTransform):
    """Point links to files, and paths in backticks, at the pages of these files."""

    default_priority = 500

    def apply(self):
        for node in list(self.document.findall(nodes.literal)):
            path = node.astext().rstrip("/")
            inside_a_link = isinstance(
                node.parent, (nodes.reference, addnodes.pending_xref, addnodes.download_reference)
            )
            if inside_a_link or not (("/" in node.astext() and path.split("/")[0] in FOLDERS) or path in FILES):
                continue
            doc = posixpath.splitext(path)[0]
            if path.endswith((".md", ".ipynb")) and doc in self.env.found_docs:
                kind = {"refdomain": "doc", "reftype": "myst", "refexplicit": True, "reftargetid": None}
                link = addnodes.pending_xref("", reftarget=doc, refdoc=self.env.docname, **kind)
                node.replace_self(link)
                link += node
            else:
                self.link(node, path, [breakable(node)])
        for kind in (addnodes.pending_xref, addnodes.download_reference):
            for node in list(self.document.findall(kind)):
                if node.get("reftype") == "myst" and not node.get("refdomain"):
                    target = node["reftarget"].split("#")[0]
                    self.link(node, posixpath.normpath(posixpath.join(self.folder, target)), node.children)

    @property
    def folder(self):
        return posixpath.dirname(self.env.docname)

    def link(self, node, path, children):
        """Replace a node by a link to the page of a file, if there is one."""
        page = page_of(path)
        if page:
            node.replace_self(
                nodes.reference(
                    "", "", *children, refuri=posixpath.relpath(page, self.folder or "."), internal=True
                )
            )  # fmt: skip


class KeepPunctuation(SphinxTransform):
    """Keep a formula and the full stop or comma after it on one line."""

    default_priority = 510

    def apply(self):
        for formula in list(self.document.findall(nodes.math)):
            text = formula.next_node(nodes.Text, descend=False, siblings=True)
            mark = (
                re.match(r"[.,;:!?)’”]+", text)
                if text and formula.parent.index(text) == formula.parent.index(formula) + 1
                else None
            )
            if mark:
                text.parent.replace(text, nodes.Text(text[mark.end() :]))
                formula.replace_self(
                    nodes.inline("", "", formula.deepcopy(), nodes.Text(mark[0]), classes=["unbroken"])
                )


def breakable(literal):
    """A path in backticks that a narrow page may break after each slash."""
    parts = re.split(r"(?<=/)(?=.)", literal.astext())
    broken = [node for part in parts for node in (nodes.Text(part), nodes.raw("", "<wbr>", format="html"))]
    return nodes.literal("", "", *broken[:-1])


def first_line(file):
    """What a file says of itself in its first line."""
    found = re.search(r'\A(?:#!.*\n)?(?:#.*\n)*\s*(?:"""|/\* |# )(.*?)(?:"""|\*/|\n|$)', file.read_text("utf-8"))
    return found[1] if found else ""


def listing(folder):
    """The body of a folder's page: its files, and what they say of themselves."""
    rows = []
    for file in sorted(folder.iterdir(), key=lambda file: (file.is_file(), file.name)):
        path = file.relative_to(ROOT).as_posix()
        if file.name.startswith((".", "__py")) or file.name == "py.typed" or (file.is_file() and file.suffix != ".py"):
            continue
        init = file / "__init__.py" if file.is_dir() else file
        if not init.is_file() or not page_of(path):
            continue
        address = f"{file.name}/index.html" if file.is_dir() else f"{file.name}.html"
        name = file.name + "/" * file.is_dir()
        said = html.escape(first_line(init))
        rows.append(f'<tr><td><a href="{address}"><code>{name}</code></a></td><td>{said}</td></tr>')
    return f'<div class="table-wrapper"><table class="docutils"><tbody>{"".join(rows)}</tbody></table></div>'


def source(file):
    """The body of a file's page: its lines, highlighted, each with an anchor L-1, L-2, …"""
    text = file.read_text("utf-8")
    try:
        lexer = guess_lexer_for_filename(file.name, text)
    except ClassNotFound:
        lexer = guess_lexer_for_filename("x.sh" if text.startswith("#!") else "x.txt", text)
    formatter = HtmlFormatter(linespans="L", linenos="inline", wrapcode=True)
    return f'<div class="source-file">{highlight(text, lexer, formatter)}</div>'


def collect(app):
    """The pages of all files and folders that are linked, and of the whole package."""
    for file in sorted([*ROOT.glob("retro_np/**/*.py"), *ROOT.glob("csrc/*.[ch]")]):
        page_of(file.relative_to(ROOT).as_posix())
    done = set()
    while wanted - done:  # the page of a folder links further files
        path = min(wanted - done)
        done.add(path)
        file = ROOT / path
        body = listing(file) if file.is_dir() else source(file)
        title = html.escape(path)
        body = f"<h1><code>{title}</code></h1>{body}"
        name = f"source/{path}/index" if file.is_dir() else f"source/{path}"
        yield name, {"title": title, "body": body, "parents": []}, "page.html"


def linkcode_resolve(domain, info):
    """The page and line of a function or class, from a page of the reference; linkcode calls this."""
    thing = sys.modules.get(info["module"])
    try:
        for name in info["fullname"].split("."):
            thing = getattr(thing, name)
        thing = inspect.unwrap(thing)
        path = inspect.getsourcefile(thing).replace("\\", "/").rpartition("/retro_np/")[2]
        line = inspect.getsourcelines(thing)[1]
    except (AttributeError, TypeError, OSError):
        return None
    return f"../{page_of(f'retro_np/{path}')}#L-{line}"


def setup(app):
    app.add_transform(LinkFiles)
    app.add_transform(KeepPunctuation)
    app.connect("html-collect-pages", collect)
    app.config.linkcode_resolve = linkcode_resolve
    return {"parallel_read_safe": False}
