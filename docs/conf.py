"""Sphinx: Markdown pages, an API reference from the docstrings, no network."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "adapters")]

project = "torch-checkpointer"
author = "the torch-checkpointer authors"
copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "torch-checkpointer"
# Links to headings, as repository pages have them.
myst_heading_anchors = 3
# Single backticks name an object where there is one, and are code where there is none.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
# What is documented without them installed must not be imported for it.
autodoc_mock_imports = ["lightning", "pytorch_lightning", "transformers"]
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# A word in single backticks may be the name of several attributes.
suppress_warnings = ["ref.python"]
