"""The README says what its examples really print."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = re.findall(
    r"```python\n(.*?)```(?:\s*prints)?\s*```text\n(.*?)```(?:[^`]*[Rr]un again,[^`]*```text\n(.*?)```)?",
    README.read_text(encoding="utf-8"),
    re.S,
)


@pytest.mark.parametrize(("code", "printed", "again"), EXAMPLES)
def test_readme_example_prints_what_is_shown(
    code: str, printed: str, again: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block followed by its output, in an empty directory and then in the one that it left."""
    monkeypatch.chdir(tmp_path)
    assert printed == _output_of(code)
    assert (again or printed) == _output_of(code)


def _output_of(code: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    return out.getvalue()


def test_readme_links_lead_somewhere() -> None:
    """Every relative link is a file of the repository."""
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text(encoding="utf-8"))
    assert links
    assert [] == [link for link in links if not (README.parent / link).exists()]
