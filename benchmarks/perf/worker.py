"""One build of this library at work: ``python -m perf.worker`` with the build on its path.

It reads a line of JSON for each call, ``[name, arguments]``, and answers with one. It uses nothing of the library that
an earlier build may lack.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import checkpointer
from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy
from perf.memory import MB, Peak
from perf.sides import Cost, State, cost_of, state_of, touched

EACH = Policy(EverySteps(1), [KeepLast(1)])


class Worker:
    """What `performance.py` can ask for."""

    def __init__(self) -> None:
        self._state: State = {}
        self._manager = CheckpointManager(None)
        self._step = 0

    def where(self) -> str:
        """Return the folder of the package."""
        return os.path.dirname(checkpointer.__file__)

    def state(self, megabytes: float, tensors: int) -> None:
        """Make the state that is saved from now on."""
        self._state = state_of(megabytes, tensors)

    def open(self, where: str, background: str | None) -> None:
        """Open a directory for saves."""
        self._manager.close()
        self._step = 0
        self._manager = CheckpointManager(where, EACH, state=lambda: self._state, background=background)  # type: ignore[arg-type]

    def save(self) -> Cost:
        """Save; with a background return what the loop waited for, after the save's end."""
        cost = cost_of(self._observe)
        self._manager.wait()
        return cost

    def restore(self, *, touch: bool = True, **options: Any) -> Cost:
        """Restore from the directory, and with ``touch`` read each page."""
        assert self._manager.last is not None
        with CheckpointManager(os.path.dirname(self._manager.location(self._manager.last.name))) as reader:
            use = touched if touch else len
            return cost_of(lambda: use(reader.restore(**options).state))  # type: ignore[union-attr]

    def quiet(self, count: int) -> Cost:
        """Observe so many steps at which nothing is due; return what one took."""
        with CheckpointManager(None, Policy(EverySteps(10**9), [KeepLast(1)]), state=dict) as manager:
            start = time.perf_counter()
            for step in range(1, count + 1):
                manager.observe({}, step, 0, epoch_end=False)
            return Cost((time.perf_counter() - start) / count)

    def extra_memory(self, where: str, background: str | None) -> float:
        """Return the peak memory that two saves add (MB)."""
        small, large = state_of(1, 4), self._state
        self._state = small
        self.open(f"{where}/small", background)
        self.save()
        self._state = large
        self.open(f"{where}/large", background)
        with Peak() as peak:
            self.save()
            self.save()
        return peak.extra / MB

    def _observe(self) -> None:
        self._step += 1
        self._manager.observe({}, self._step, 0, epoch_end=False)


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What a library prints must not be taken for an answer.
    worker = Worker()
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = {"value": getattr(worker, name)(**arguments)}
        except Exception as error:  # The table says it.
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
