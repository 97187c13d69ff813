"""The documentation site: ``sphinx-build -W docs build/site``. Nothing of it needs a network."""

import sys
from pathlib import Path

import osculate

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "osculate"
author = "The osculate developers"
copyright = author
version = release = osculate.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_parser",
    "sphinx_copybutton",
    "sphinx_design",
    "notfound.extension",
    "plain_docstrings",
    "linked_names",
]
exclude_patterns = ["_build", "examples/README.md", "examples/own_parts/*.egg-info"]
root_doc = "index"

# Pages: GitHub's Markdown, with its anchors; an internal link that leads nowhere is an error of the build.
myst_enable_extensions = ["colon_fence", "attrs_inline"]
myst_heading_anchors = 4
suppress_warnings: list[str] = []

# Reference: signatures as they are written, names as a user imports them.
add_module_names = False
default_role = "literal"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 90
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"osculate {version}"
html_static_path = ["_static"]
html_css_files = ["osculate.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
copybutton_exclude = ".linenos, .gp, .go"
notfound_urls_prefix = "/"
