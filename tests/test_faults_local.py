"""A local disk that is full, broken or lying, at every byte and every system call: what was acknowledged is there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import attrs
import mounts
import pytest
from fault_me import FOREIGN, WARM, Run, check_survivor, policy_of

pytestmark = pytest.mark.slow

Last = Literal["link", "copy"]
PYTHON = os.path.realpath(sys.executable)


# The n-th system call


@attrs.frozen
class Outcome:
    """What a training said while its system calls were tampered with."""

    saved: list[int]
    failed: dict[int, str]
    warned: list[str]
    closed: bool
    returncode: int
    hits: int
    """How many system calls were tampered with."""


def run_with_fault(directory: Path, last: Last, calls: str, fault: str) -> Outcome:
    """Train, and from the third save on let strace do ``fault`` to ``calls``."""
    mounts.need("strace")
    directory.mkdir()
    (directory / FOREIGN).write_bytes(b"mine")
    log = directory.parent / f"{directory.name}.strace"
    child = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("fault_me.py")), str(directory), last],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stderr is not None
    tracer = None
    try:
        lines = [child.stdout.readline() for _ in range(WARM + 1)]
        assert "ready\n" == lines[-1], child.stderr.read()
        tracer = subprocess.Popen(
            ["strace", "-f", "-o", log, "-e", f"trace={calls}", "-e", f"inject={calls}:{fault}", "-p", str(child.pid)],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert tracer.stderr is not None
        said = tracer.stderr.readline()
        assert "attached" in said, said
        child.stdin.write("go\n")
        child.stdin.flush()
        lines += child.stdout.read().splitlines(keepends=True)
        child.wait(timeout=60)
        tracer.wait(timeout=60)
        tracer.stderr.close()
    finally:
        for process in (child, tracer):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
        child.stdin.close()
        child.stdout.close()
        child.stderr.close()
    said_words = [line.split(maxsplit=2) for line in lines if line.endswith("\n")]
    return Outcome(
        saved=[int(words[1]) for words in said_words if words[0] == "saved"],
        failed={int(words[1]): words[2] for words in said_words if words[0] == "failed"},
        warned=[" ".join(words[1:]) for words in said_words if words[0] == "warned"],
        closed=["closed"] in said_words,
        returncode=child.returncode,
        hits=log.read_text().count("(INJECTED)") if log.exists() else 0,
    )


def every_call(base: Path, last: Last, calls: str, fault: str) -> Iterator[tuple[Path, Outcome, str]]:
    """Run with the fault at the first call, at the second, and so on until there is none left to hit."""
    for n in range(1, 1000):
        directory = base / f"{n}"
        outcome = run_with_fault(directory, last, calls, f"{fault}:when={n}")
        if not outcome.hits and outcome.closed:
            assert n > 1, f"{calls} is never called"
            return
        yield directory, outcome, f"{fault} at call {n} of {calls}, last={last}: {outcome}"


CALLS = {
    "fsync": "fsync",
    "write": "write",
    "open": "openat",
    "rename": "rename,renameat,renameat2",
    "link": "link,linkat",
    "symlink": "symlink,symlinkat",
    "unlink": "unlink,unlinkat",
    "stat": "newfstatat,lstat,stat,fstat",
}


@pytest.mark.parametrize("last", ["link", "copy"])
@pytest.mark.parametrize("call", [call for call in CALLS if call != "unlink"])
def test_any_system_call_may_fail_and_nothing_acknowledged_is_lost(tmp_path: Path, call: str, last: Last) -> None:
    """EIO at the n-th call, for every n: the save fails with a clear error or works, and the next one works."""
    for directory, outcome, clue in every_call(tmp_path, last, CALLS[call], "error=EIO"):
        assert 0 == outcome.returncode, clue
        assert outcome.closed, clue
        assert len(outcome.failed) <= 1, clue
        assert all("Input/output error" in error for error in outcome.failed.values()), clue
        assert {1, 2, 3, 4, 5, 6} == {*outcome.saved, *outcome.failed}, clue
        check_survivor(directory, outcome.saved, policy_of(last), clue)


@pytest.mark.parametrize("error", ["EACCES", "EPERM"])
def test_refused_delete_is_a_warning_and_is_tried_again(tmp_path: Path, error: str) -> None:
    """No save fails for it, and nothing stays that should have gone."""
    for directory, outcome, clue in every_call(tmp_path, "link", CALLS["unlink"], f"error={error}"):
        assert {} == outcome.failed, clue
        assert [1, 2, 3, 4, 5, 6] == outcome.saved, clue
        check_survivor(directory, outcome.saved, policy_of("link"), clue)


@pytest.mark.parametrize("last", ["link", "copy"])
@pytest.mark.parametrize("call", ["fsync", "rename", "link", "unlink", "symlink"])
def test_killed_instead_of_any_system_call_nothing_acknowledged_is_lost(tmp_path: Path, call: str, last: Last) -> None:
    """SIGKILL where the n-th call would be, for every n."""
    for directory, outcome, clue in every_call(tmp_path, last, CALLS[call], "error=EIO:signal=KILL"):
        assert -signal.SIGKILL == outcome.returncode, clue
        check_survivor(directory, outcome.saved, policy_of(last), clue)
