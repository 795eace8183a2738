"""Sphinx extension: a page for each public class, whose arguments are in a table made of docstring and signature."""

from __future__ import annotations

import enum
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import attrs
from sphinx.application import Sphinx
from sphinx.util import logging

PAGES: Final = {
    "CheckpointManager": "checkpointer.CheckpointManager",
    "DistributedManager": "checkpointer.DistributedManager",
    "Policy": "checkpointer.Policy",
    "Naming": "checkpointer.Naming",
    "Metric": "checkpointer.Metric",
    "Mirror": "checkpointer.Mirror",
    "HMACKey": "checkpointer.HMACKey",
    **{
        name: f"checkpointer.{name}"
        for name in (
            *("EverySteps", "EveryEpochs", "DuringEpochs", "EverySeconds", "EveryCount", "EveryFraction", "AtSteps"),
            *("OnImprovement", "When", "Continuous", "AnyOf"),
            *("KeepBest", "KeepLast", "KeepEvery", "KeepFor", "KeepWhere", "KeepAll", "Budget"),
        )
    },
    "Loop": "checkpointer_torch.Loop",
    "ModelCheckpoint": "checkpointer_lightning.model_checkpoint.DropIn",
    "CheckpointCallback": "checkpointer_lightning.checkpoint_callback.Composed",
    "CheckpointCallback-transformers": "checkpointer_transformers.callback.CheckpointCallback",
    "LocalStorage": "checkpointer.storage.local.LocalStorage",
    "FsspecStorage": "checkpointer.storage.remote.FsspecStorage",
    "S3Storage": "checkpointer.storage.s3.S3Storage",
    "MemoryStorage": "checkpointer.storage.memory.MemoryStorage",
}
"""The class of each page in ``docs/reference``, by the name of the page. docs/api.md lists the pages."""
_TITLES: Final = {
    "ModelCheckpoint": "ModelCheckpoint (Lightning)",
    "CheckpointCallback": "CheckpointCallback (Lightning)",
    "CheckpointCallback-transformers": "CheckpointCallback (Hugging Face Trainer)",
}
_log = logging.getLogger(__name__)


def write_pages(app: Sphinx) -> None:
    """Write the page of each class; Sphinx builds only those that changed."""
    folder = Path(app.srcdir) / "reference"
    folder.mkdir(exist_ok=True)
    for page, path in PAGES.items():
        text = f"# {_TITLES.get(page, page)}\n\n```{{eval-rst}}\n.. autoclass:: {path}\n   :members:\n```\n"
        file = folder / f"{page}.md"
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


def put_table(_app: Sphinx, what: str, name: str, of: Any, _options: Any, lines: list[str]) -> None:
    """Put a table in place of the section ``Args`` of a class that has a page."""
    if what != "class" or name not in PAGES.values():
        return
    found = parameters_of(of)
    begin = lines.index("Args:") if "Args:" in lines else len(lines)
    end = next((n for n in range(begin + 1, len(lines)) if re.match(r"\S", lines[n])), len(lines))
    texts = parse_arguments(lines[begin + 1 : end])
    if texts.keys() != found.keys():
        wrong = ", ".join(sorted(texts.keys() ^ found.keys()))
        _log.warning("%s: the docstring and the signature have other arguments: %s", name, wrong)
    rows = [(f"``{key}``", *found[key], texts[key]) for key in texts if key in found]
    lines[begin:end] = table_of(("Argument", "Type", "Default", "What it does"), rows) if rows else []


def parse_arguments(lines: list[str]) -> dict[str, str]:
    """Return the text of each argument of a section ``Args`` in Google's style."""
    texts: dict[str, str] = {}
    name = ""
    for line in lines:
        if head := re.match(r"    ([*\w]+): (.*)", line):
            name, text = head[1], head[2]
            texts[name] = text
        elif name:
            texts[name] += f" {line.strip()}"
    return {name: text.strip() for name, text in texts.items()}


def parameters_of(of: Any) -> dict[str, tuple[str, str]]:
    """Return type and default of each argument, as they are shown."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    fields = {field.name: field for field in attrs.fields(of)} if attrs.has(of) else {}
    found = {}
    for name, parameter in inspect.signature(of).parameters.items():
        kind, default = parameter.annotation, parameter.default
        if name in fields:
            kind = fields[name].type if kind is inspect.Parameter.empty else kind
            default = fields[name].default if default is attrs.NOTHING else default
        text = kind if isinstance(kind, str) else inspect.formatannotation(kind).replace("typing.", "")
        is_required = default is inspect.Parameter.empty and parameter.kind not in stars
        shown = "required" if is_required else "" if parameter.kind in stars else f"``{default_text(default)}``"
        found[stars.get(parameter.kind, "") + name] = (f"``{text}``", shown)
    return found


def default_text(value: Any) -> str:
    """Return a default as a user would write it."""
    if isinstance(value, attrs.Factory):  # type: ignore[arg-type]
        return default_text(value.factory())
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Mapping) and not value:
        return "{}"
    if isinstance(value, tuple):
        return f"({', '.join(map(default_text, value))})"
    return repr(value)


def table_of(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Return the lines of a table in reStructuredText."""
    lines = [".. list-table::", "   :header-rows: 1", "   :widths: 20 22 14 44", "   :class: arguments", ""]
    for row in (head, *rows):
        lines += [f"   {'*' if number == 0 else ' '} - {cell}" for number, cell in enumerate(row)]
    return [*lines, ""]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension with Sphinx."""
    app.connect("builder-inited", write_pages)
    # Before napoleon, which has 500.
    app.connect("autodoc-process-docstring", put_table, priority=400)
    return {"parallel_read_safe": True}
