"""Runs the Python blocks of the README and of the documentation, each page twice: ``pytest README.md docs``.

A text block that directly follows a Python block shows what that one prints, and is compared with it at the first pass.
The second pass starts in the directory that the first one left, as a second start of a training does.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
from sybil import Document, Example, Region, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.myst import CodeBlockParser, SkipParser
from sybil.sybil import SybilCollection

_PRINTED = re.compile(r"^```python\n(?:(?!```)[^\n]*\n)*```\n\n```text\n(?P<text>.*?)^```", re.M | re.S)
_VARYING = (
    (re.compile(r"\b[0-9a-f]{12,}\b"), "<digest or id>"),
    (re.compile(r"\b\d+(\.\d+)? ?(us|ms|s|min|h|days?)\b"), "<time>"),
    (re.compile(r"\b\d+(\.\d+)? [kMGT]?B\b"), "<size>"),
)


class _Program(CodeBlockParser):
    """Runs Python blocks, and keeps what each prints."""

    language = "python"

    def evaluate(self, example: Example) -> None:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            PythonEvaluator()(example)
        example.namespace["_printed"] = out.getvalue()


def _printed(document: Document) -> Iterator[Region]:
    """Find the text blocks that show what the block above prints."""
    for found in _PRINTED.finditer(document.text):
        yield Region(found.start("text"), found.end("text"), found["text"], _compare)


def _compare(example: Example) -> str | None:
    printed = example.namespace.pop("_printed", None)
    # The block above was skipped if there is nothing.
    if printed is None or _normal(example.parsed) == _normal(printed):
        return None
    return f"the page shows\n{example.parsed}\nand the program prints\n{printed}"


def _normal(text: str) -> str:
    """Return a text without what differs from run to run: times, sizes, digests and ids."""
    for varying, name in _VARYING:
        text = varying.sub(name, text)
    return text


def _begin(namespace: dict[str, Any]) -> None:
    for package in ("accelerate", "ignite", "lightning", "ray", "sentence_transformers", "transformers", "trl"):
        namespace[f"has_{package}"] = find_spec(package) is not None


def _begin_in_an_empty_folder(namespace: dict[str, Any]) -> None:
    _begin(namespace)
    namespace["_home"] = os.getcwd()
    namespace["_folder"] = tempfile.TemporaryDirectory()
    os.chdir(namespace["_folder"].name)


def _leave_folder(namespace: dict[str, Any]) -> None:
    os.chdir(namespace["_home"])
    namespace["_folder"].cleanup()


_PATTERNS = ["README.md", "docs/*.md"]
_first = Sybil(
    [_Program(), _printed, SkipParser()], patterns=_PATTERNS, setup=_begin_in_an_empty_folder, teardown=_leave_folder
)
_second = Sybil([_Program(), SkipParser()], patterns=_PATTERNS, setup=_begin)

pytest_collect_file = SybilCollection((_first, _second)).pytest()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let trainers warn on their pages: of data loaders without workers, for example."""
    for item in items:
        if item.path.name in ("lightning.md", "more-hosts.md", "transformers.md"):
            for ignored in ("ignore", "error::checkpointer.CheckpointerWarning"):
                item.add_marker(pytest.mark.filterwarnings(ignored))
