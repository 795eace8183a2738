"""The pages show whole programs: nothing is hidden that a program needs, and what is printed is what they print."""

from __future__ import annotations

import ast
import builtins
import re
from pathlib import Path

import pytest
from support.commands import command

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
_HIDDEN = re.compile(r"<!--- ?invisible-code-block: python\n(.*?)^-->", re.M | re.S)
_PROGRAM = re.compile(r"(<!--- skip: next -->\n\n)?^```python\n(.*?)^```", re.M | re.S)
_SAYS_SO = re.compile(r"follow(s)? (each other|the program above)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_hides_only_checks(page: Path) -> None:
    """A set-up that CI runs and readers do not see would let programs pass that fail as they are shown.

    Only the environment that a launcher such as torchrun gives a program is set, and removed again.
    """
    for hidden in _HIDDEN.findall(page.read_text(encoding="utf-8")):
        for node in ast.parse(hidden).body:
            parts = node.body if isinstance(node, ast.If) else [node]
            of_launcher = "os.environ" in hidden and re.search(r"\bos\b|from_torchrun", ast.unparse(node))
            assert of_launcher or all(isinstance(part, ast.Assert) for part in parts), ast.unparse(node)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_first_program_of_a_page_is_whole_and_a_page_says_if_others_are_not(page: Path) -> None:
    """A program that uses names of the ones above it follows them."""
    text = page.read_text(encoding="utf-8")
    programs = [code for skipped, code in _PROGRAM.findall(text) if not skipped]
    needs = [_unbound(ast.parse(code)) for code in programs]
    assert not any(needs[:1])
    if any(needs[1:]):
        assert _SAYS_SO.search(text), needs


def _unbound(tree: ast.Module) -> list[str]:
    """Return the names that a program uses, and neither binds nor imports."""
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    bound = {node.id for node in names if not isinstance(node.ctx, ast.Load)} | {*dir(builtins)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            bound |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return sorted({node.id for node in names} - bound)


def test_the_page_on_the_command_line_shows_what_doctor_checks(tmp_path: Path) -> None:
    """The topics and their order; what it finds depends on the machine."""
    page = (ROOT / "docs/command-line.md").read_text(encoding="utf-8")
    shown = re.search(r"^\$ checkpointer doctor runs/new --size 20GB\n(.*?)^```", page, re.M | re.S)
    assert shown is not None
    said = command("doctor", tmp_path / "new", "--size", "1GB")
    topics = re.compile(r"^(?:ok|note|BAD) +([a-z ]+):", re.M)
    assert topics.findall(shown[1]) == topics.findall(said.out)
