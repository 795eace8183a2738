"""The tests of the suite that need a device; without one it is only looked whether they are found."""

from __future__ import annotations

import subprocess
import sys

from trees import REPOSITORY

from gpu.device import Run

MARK = "pytest.mark.cuda"


def checked(run: Run) -> list[tuple[str, ...]]:
    """Run them.

    Raises:
        AssertionError: If one fails, or none is found.
    """
    tests = REPOSITORY / "tests"
    files = [str(path) for path in sorted(tests.rglob("test_*.py")) if MARK in path.read_text(encoding="utf-8")]
    # The configuration next to pyproject.toml is for the pages of the documentation, and needs a package more.
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", f"--confcutdir={tests}"]
    if not run.on_cuda:
        command.append("--collect-only")
    done = subprocess.run([*command, *files], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.strip().splitlines()[-1].strip("= ")
    return [("tests that need a device", "pytest -m cuda", last, "")]
