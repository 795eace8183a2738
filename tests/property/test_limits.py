"""Half a gigabyte and ten seconds are enough to read any file of a megabyte."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import support


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of memory is one of Linux")
def test_every_reader_takes_ten_seconds_and_half_a_gigabyte_at_most() -> None:
    """In a process that has imported everything: each file of `support.large_files` with each reader of its kind."""
    script = Path(support.__file__).with_name("limited_me.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=600, check=False)
    assert 0 == done.returncode, done.stderr[-2000:]
    *bad, last = done.stdout.splitlines()
    assert [] == bad, done.stderr[-2000:]
    assert int(last.split()[0]) > 25
