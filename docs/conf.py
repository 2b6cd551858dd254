"""Settings of the documentation site: `python -m sphinx -W --keep-going -b html docs site`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

from bicache_jax.core.version import version as _version  # noqa: E402

project = "bicache-jax"
author = "the bicache-jax authors"
project_copyright = "the bicache-jax authors, Apache-2.0"
version = release = _version()

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "from_library"]
exclude_patterns = ["_ext"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
smartquotes = False  # flags have two hyphens

# Docstrings are written for editors and `help()`, with single backticks for code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
maximum_signature_line_length = 80
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = "bicache-jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
