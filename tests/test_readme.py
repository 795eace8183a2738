"""The README says what its examples really print."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = re.findall(
    r"```python\n(.*?)```(?:\s*prints)?\s*```text\n(.*?)```", README.read_text(encoding="utf-8"), re.S
)


@pytest.mark.parametrize(("code", "printed"), EXAMPLES)
def test_readme_example_prints_what_is_shown(
    code: str, printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block followed by its output, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert printed == out.getvalue()


def test_readme_links_lead_somewhere() -> None:
    """Every relative link is a file of the repository."""
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text(encoding="utf-8"))
    assert links
    assert [] == [link for link in links if not (README.parent / link).exists()]
