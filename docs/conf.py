"""Settings of the documentation site: `python -m sphinx -W --keep-going -b html docs site`."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

from bicache_jax.core.version import version as _version  # noqa: E402

project = "bicache-jax"
author = "the bicache-jax authors"
project_copyright = "the bicache-jax authors, Apache-2.0"
version = release = _version()

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "command_reference"]
exclude_patterns = ["_ext"]
nitpick_ignore_regex = [(r"py:.*", r".*")]  # annotations name types of jax and jaxtyping, whose pages are elsewhere

myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

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
pygments_style = "default"


def _plain_shapes(app, what, name, obj, options, signature, returns):
    """Signatures show `Int[Array, 'B U']` as it is written, not the objects that it stands for."""
    if signature:
        signature = re.sub(r"<object object at 0x[0-9a-f]+>", "...", signature)
    return signature, returns


def setup(app):
    """Connects what is above."""
    app.connect("autodoc-process-signature", _plain_shapes)
