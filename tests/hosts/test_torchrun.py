"""A SIGTERM to torchrun, which passes it on to the processes that it has started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from checkpointer import CheckpointManager

pytestmark = pytest.mark.slow

PATIENCE_S = 240
SCRIPT = Path(__file__).parents[1] / "support/torchrun_me.py"
RANKS = range(2)


def installed(package: str) -> str:
    """Return the version of a package; empty if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def launch(host: str, folder: Path, steps: int) -> subprocess.Popen[bytes]:
    """Start a training of two ranks in a process group of its own."""
    path = ":".join(filter(None, (*sys.path, str(SCRIPT.parents[1] / "transformers"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(PATIENCE_S)  # Until torchrun kills a process that is stopping.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(len(RANKS))]
    with open(folder / "output.txt", "ab") as output:
        return subprocess.Popen(
            [*torchrun, str(SCRIPT), host, str(folder), str(steps)],
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def noted(torchrun: subprocess.Popen[bytes], folder: Path, name: str) -> list[int]:
    """Return what each rank has written down, once all have."""
    paths = [folder / f"{name}-{rank}" for rank in RANKS]
    give_up = time.monotonic() + PATIENCE_S
    while not all(path.exists() for path in paths):
        assert torchrun.poll() is None, (folder / "output.txt").read_text()
        assert time.monotonic() < give_up, (folder / "output.txt").read_text()
        time.sleep(0.1)
    return [int(path.read_text()) for path in paths]


def is_alive(pid: int) -> bool:
    """Return whether there is a process with this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(("host", "gets"), [("loop", "job"), ("loop", "group"), ("trainer", "job")])
def test_a_sigterm_to_torchrun_and_its_workers_saves_once_and_ends_them(tmp_path: Path, host: str, gets: str) -> None:
    """If the job gets it, each worker gets it twice, once from torchrun. A resume goes on from that step.

    The workers have groups of their own, so the group of torchrun is torchrun alone.
    """
    hugging_face = installed("transformers")
    if host == "trainer" and not hugging_face:
        pytest.skip("transformers is not installed")
    torchrun = launch(host, tmp_path, 1_000_000)
    pids = noted(torchrun, tmp_path, "ready")
    for pid in pids if gets == "job" else []:
        os.kill(pid, signal.SIGTERM)
    os.killpg(torchrun.pid, signal.SIGTERM)
    assert 0 != torchrun.wait(PATIENCE_S)
    assert not any(map(is_alive, pids))
    (saved,) = CheckpointManager(tmp_path / "run").records
    assert "rescue" == saved.kind, (tmp_path / "output.txt").read_text()
    if host == "trainer" and hugging_face.startswith("4."):
        return  # It cannot resume two processes on CPUs, with or without us.
    resumed = launch(host, tmp_path, saved.step + 2)
    assert 0 == resumed.wait(PATIENCE_S), (tmp_path / "output.txt").read_text()
    assert [saved.step] * len(RANKS) == noted(resumed, tmp_path, "begin")
