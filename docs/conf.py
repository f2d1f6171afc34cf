"""Settings of the site that `make docs` builds: the pages of this folder, and the docstrings of the library."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

from sphinx.ext.autodoc.mock import mock

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import hgad_fast  # noqa: E402 (from this checkout)

if importlib.util.find_spec("anomalib") is None:  # its models are described without it
    with mock(["anomalib", "lightning", "openvino", "pandas", "torchmetrics"]):
        import anomalib

        anomalib.__spec__ = importlib.machinery.ModuleSpec("anomalib", None, origin="mocked")
        import hgad_fast.anomalib  # noqa: F401

project = "hgad_fast"
author = "the authors of hgad_fast"
version = release = hgad_fast.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "extension"]

# Names in backticks are links where the site has them; types of other libraries and of the inside are none.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [("py:(obj|class)", ".*")]

myst_heading_anchors = 3
smartquotes = False  # -- begins an option
highlight_language = "text"  # of blocks that name none: commands, folders

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"hgad_fast {release}"
html_math_renderer = "mathml"
html_copy_source = False
html_show_search_summary = False  # a browser that reads files fetches none
html_show_sphinx = False
html_use_index = False  # names as long as lines, in columns: the search finds them
