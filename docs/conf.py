"""Sphinx: Markdown pages, an API reference from the docstrings, no network."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "adapters"), str(ROOT / "docs")]

project = "torch-checkpointer"
author = "the torch-checkpointer authors"
copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "argument_tables"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "torch-checkpointer"
html_static_path = ["_static"]
html_css_files = ["arguments.css"]
# Links to headings work as on the repository's pages.
myst_heading_anchors = 3
# If an object has the name in single backticks, they link to it; else they show code.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
# The pages are built without these packages, so they are not imported.
autodoc_mock_imports = ["lightning", "pytorch_lightning", "transformers"]
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# A name in single backticks may belong to several attributes.
suppress_warnings = ["ref.python"]
