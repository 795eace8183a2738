"""Runs the Python blocks of the README and of the documentation, each page twice: ``pytest README.md docs``.

The second pass starts in the directory that the first one left, as a second start of a training does.
"""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec
from typing import Any

from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser, SkipParser
from sybil.sybil import SybilCollection


def _begin(namespace: dict[str, Any]) -> None:
    for package in ("accelerate", "ignite", "lightning", "ray"):
        namespace[f"has_{package}"] = find_spec(package) is not None


def _begin_in_an_empty_folder(namespace: dict[str, Any]) -> None:
    _begin(namespace)
    namespace["_home"] = os.getcwd()
    namespace["_folder"] = tempfile.TemporaryDirectory()
    os.chdir(namespace["_folder"].name)


def _leave_folder(namespace: dict[str, Any]) -> None:
    os.chdir(namespace["_home"])
    namespace["_folder"].cleanup()


_PAGES = {"parsers": [PythonCodeBlockParser(), SkipParser()], "patterns": ["README.md", "docs/*.md"]}
_first = Sybil(**_PAGES, setup=_begin_in_an_empty_folder, teardown=_leave_folder)
_second = Sybil(**_PAGES, setup=_begin)

pytest_collect_file = SybilCollection((_first, _second)).pytest()
