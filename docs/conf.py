"""Sphinx configuration; `make docs` builds without a network and turns every warning into an error."""

import os

from projunn_manifold import __version__

project = "projunn_manifold"
author = "The projunn_manifold developers"
project_copyright = author
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",  # after mathjax: formulas need no network, neither here nor at the reader's
    "sphinx_copybutton",
]
if os.environ.get("DOCS_INTERSPHINX"):  # needs the network
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "geoopt": ("https://geoopt.readthedocs.io/en/latest", None),
    }

exclude_patterns = ["_build"]
myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
add_module_names = False
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"projunn_manifold {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sphinx = False

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
