"""Sphinx's settings of the book. build.py makes the folder that Sphinx reads, and calls it."""

import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

project = "RETRO in NumPy"
author = "the authors of retro_np"
html_title = project
root_doc = "book"
language = "en"

extensions = [
    "myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.linkcode", "sphinx_copybutton",
    "docstrings", "sources",
]  # fmt: skip
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb", ".rst": "restructuredtext"}

# Pages and notebooks
nb_execution_mode = "off"  # The committed outputs are shown.
nb_merge_streams = True
nb_code_prompt_show = nb_code_prompt_hide = "The code of this figure"
nb_render_text_lexer = "none"
myst_enable_extensions = ["dollarmath", "amsmath", "attrs_block"]
myst_heading_anchors = 4  # GitHub's anchors, so that links with # work in both places
highlight_language = "none"
mathjax_path = "mathjax/tex-svg.js"

# The reference of the package
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_type_aliases = {name: name for name in ("Array", "Tree", "Pullback")}
python_use_unqualified_type_names = True
maximum_signature_line_length = 80
add_module_names = False

# The theme
html_theme = "furo"
templates_path = ["templates"]
html_sidebars = {
    "**": [
        "sidebar/brand.html", "sidebar/search.html", "sidebar/scroll-start.html", "start.html",
        "sidebar/navigation.html", "sidebar/scroll-end.html",
    ]
}  # fmt: skip
html_favicon = "static/favicon.svg"
html_css_files = ["book.css"]
html_show_sphinx = False
html_show_copyright = False
html_show_sourcelink = False
html_copy_source = False
html_domain_indices = False
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
settings = tomllib.loads((HERE.parents[1] / "pyproject.toml").read_text("utf-8"))["tool"].get("retro_np", {})
if settings.get("repository"):
    footer = {"name": "Repository", "url": settings["repository"], "html": "repository", "class": ""}
    html_theme_options["footer_icons"] = [footer]
pygments_style = "default"
copybutton_selector = ".cell_input pre, :not(.output) > .highlight-python pre, :not(.output) > .highlight-none pre"
