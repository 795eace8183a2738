"""The README shows what its examples really print, and every page links to files that exist."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    *ROOT.glob("adapters/*.md"),
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("docs/adr/*.md"),
]
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


def test_links_of_every_page_lead_to_files() -> None:
    """Also those with an anchor."""
    links = [
        (page.name, page.parent / link)
        for page in PAGES
        for link in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    ]
    assert len(links) > 200
    assert [] == [(page, str(link)) for page, link in links if not link.exists()]
