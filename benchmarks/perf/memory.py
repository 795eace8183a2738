"""The peak memory that a save adds to a process: ``python -m perf.memory PEER MEGABYTES KIND`` prints it for a peer.

Other processes that a peer starts are not counted.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import TracebackType

MB = 2**20


class Peak:
    """The peak of a block, over what the process had before."""

    extra: int = 0
    """Bytes, after the block."""

    def __enter__(self) -> Peak:
        Path("/proc/self/clear_refs").write_text("5")  # The peak starts anew.
        self._before = _resident_peak()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.extra = _resident_peak() - self._before


def _resident_peak() -> int:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def of_peer(name: str, megabytes: int, kind: str) -> float:
    """Return the peak memory that two saves of a peer add, measured in a process of its own (MB).

    Raises:
        RuntimeError: If the peer cannot do it.
    """
    command = [sys.executable, "-W", "ignore", "-m", "perf.memory", name, str(megabytes), kind]
    here = Path(__file__).parent.parent
    run = subprocess.run(command, capture_output=True, text=True, env=_environment(here))
    found = [line.split()[1] for line in run.stdout.splitlines() if line.startswith("extra ")]
    if not found:
        raise RuntimeError((run.stderr.strip().splitlines() or ["no answer"])[-1])
    return float(found[0])


def _environment(here: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(here), os.environ.get("PYTHONPATH")]))}


def main(name: str, megabytes: int, kind: str) -> None:
    """Save twice as a peer does, and print the peak."""
    from perf.peers import FINDERS
    from perf.sides import drop, folder, state_of

    peer = FINDERS[name]()
    if kind == "background":
        assert not isinstance(peer.behind, str)
        begin, wait = peer.behind
    else:
        assert not isinstance(peer.save, str)
        begin, wait = peer.save, lambda: None
    with folder() as path:
        begin(state_of(1, 4), f"{path}/small")
        wait()
        state = state_of(megabytes)
        with Peak() as peak:
            for _ in range(2):
                drop(f"{path}/large")
                begin(state, f"{path}/large")
                wait()
    print("extra", peak.extra / MB, flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
