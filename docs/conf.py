"""Sphinx configuration; `make docs` builds without a network and turns every warning into an error."""

import zlib
from pathlib import Path

from projunn_manifold import __version__

project = "projunn_manifold"
author = "The projunn_manifold developers"
project_copyright = author
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",  # after mathjax: formulas need no network, neither here nor at the reader's
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
# Without a network the names of other packages are found in an inventory of nothing, and are not links.
NOTHING = Path(__file__).parent / "_build" / "nothing.inv"
intersphinx_mapping = {
    "torch": ("https://docs.pytorch.org/docs/stable", (None, str(NOTHING))),
    "geoopt": ("https://geoopt.readthedocs.io/en/latest", (None, str(NOTHING))),
}
intersphinx_timeout = 10


def setup(app):
    NOTHING.parent.mkdir(exist_ok=True)
    NOTHING.write_bytes(b"# Sphinx inventory version 2\n# Project: \n# Version: \n# zlib\n" + zlib.compress(b""))


exclude_patterns = ["_build"]
myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
add_module_names = False
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_param = False  # "beta, gamma : float" stays one line, with one text
napoleon_use_rtype = False

sphinx_gallery_conf = {
    "examples_dirs": ["../examples/tutorials", "../examples/gallery"],
    "gallery_dirs": ["tutorials", "gallery"],
    "filename_pattern": "/",  # run them all
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "write_computation_times": False,
    "capture_repr": (),  # what a page shows is what its script prints
}

html_theme = "furo"
html_title = f"projunn_manifold {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sphinx = False

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
