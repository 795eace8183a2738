"""Small trainings for `support.hosts`. They are children of this process, which imports everything once.

The numbers of a training depend on its step alone, so each run that goes on from any step gets the same ones.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any, Final, Literal

from checkpointer import CheckpointManager, EverySteps, KeepBest, Policy
from checkpointer.clock import SystemClock
from checkpointer.storage.retry import Retry
from support.kill_me import report
from support.plain_format import PlainFormat
from support.servers import KINDS

Last = Literal["link", "copy"]

_EFFECTS: Final = {
    "open", "os.link", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir", "os.symlink",
    "os.utime",
}  # fmt: skip
"""Audit events of what a storage does in a folder. Python raises each before the effect."""


def loss_of(step: int) -> float:
    """Return a loss that falls and rises, so that most saves retire a checkpoint."""
    return float(step * 7919 % 101)


def policy_of(last: Last) -> Policy:
    """Return the policy of a training, which saves each step."""
    return Policy(EverySteps(1), [KeepBest(2, "loss", mode="min")], last=last, best="link")


def new_state() -> dict[str, Any]:
    """Return a state before its first step. ``trained_by`` has the host's name for each step."""
    return {"step": 0, "weights": [1.0, 2.0, 3.0], "trained_by": []}


def advance(state: dict[str, Any], host: str) -> None:
    """Do one step of gradient descent, by the numbers of that step."""
    state["step"] += 1
    step = state["step"]
    state["weights"] = [w - 0.1 * (w - 1 / (step + index)) for index, w in enumerate(state["weights"], 1)]
    state["trained_by"] = [*state["trained_by"], host]


def undisturbed(steps: int) -> list[float]:
    """Return the weights of a run that nothing disturbed."""
    state = new_state()
    for _ in range(steps):
        advance(state, "")
    weights: list[float] = state["weights"]
    return weights


class ShiftedClock(SystemClock):
    """The time of a host whose clock is wrong by ``shift`` seconds."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self._shift = shift

    def time(self) -> float:
        return super().time() + self._shift


class Stops:
    """Counts what this process does in ``folder``, and stops the process at number ``at``; 0 never stops."""

    def __init__(self, folder: str, at: int) -> None:
        self.count = 0
        self._folder = folder
        self._at = at
        sys.addaudithook(self._count)

    def _count(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _EFFECTS or not any(self._is_inside(one) for one in arguments[:2]):
            return
        self.count += 1
        if self.count == self._at:
            self._stop(event, arguments)

    def _stop(self, event: str, arguments: tuple[Any, ...]) -> None:
        report("stops", self.count, event, *map(str, arguments[:2]))
        os.kill(os.getpid(), signal.SIGSTOP)

    def _is_inside(self, argument: Any) -> bool:
        return isinstance(argument, (str, os.PathLike)) and os.fspath(argument).startswith(self._folder)


def train(
    url: str,
    *,
    steps: int,
    options: dict[str, Any] | None = None,
    last: Last = "link",
    pause_s: float = 0.0,
    gate: int = 0,
    stop_at: int = 0,
    shift_s: float = 0.0,
    manager: dict[str, Any] | None = None,
) -> None:
    """Restore, and train up to ``steps``; at step ``gate`` wait for a line on stdin.

    Args:
        url: The directory.
        steps: The last step.
        options: The storage options; None is a local folder.
        last: The kind of the alias.
        pause_s: Seconds of each step.
        gate: The step before which the training waits; 0 does not wait.
        stop_at: Number of the operation in the folder at which it stops itself; 0 never stops.
        shift_s: Seconds that this host's clock is ahead.
        manager: More arguments of `CheckpointManager`.
    """
    stops = Stops(url, stop_at)
    state, host = new_state(), socket.gethostname()
    known = inspect.signature(CheckpointManager).parameters
    with CheckpointManager(
        url,
        policy_of(last),
        state=lambda: state,
        format=PlainFormat(),
        storage_options=options if options is None else {**options, "retry": Retry(deadline_s=60)},
        clock=ShiftedClock(shift_s),
        **{name: value for name, value in (manager or {}).items() if name in known},
    ) as opened:
        if (restored := opened.restore()) is not None:
            state.update(restored.state)
            if state["step"] < steps:  # More metrics of the restored checkpoint, as after a validation.
                opened.observe({"resumed": 1.0}, step=state["step"], epoch=0, epoch_end=False)
        report("restored", state["step"])
        while state["step"] < steps:
            time.sleep(pause_s)
            if gate == state["step"] + 1:
                report("waits")
                sys.stdin.readline()
            advance(state, host)
            step = state["step"]
            opened.observe({"loss": loss_of(step)}, step=step, epoch=0, epoch_end=False)
            if step % 2 == 0:  # Late metrics change the record of a saved step.
                opened.observe({"accuracy": 1 / step}, step=step, epoch=0, epoch_end=False)
            report("saved", step, stops.count)
        names = opened.policy.name  # An alias that another writer may still change is left to it.
        report("aliases", names.last_file, names.best_file)
        kept = {record.name: [record.digest, dict(record.metrics)] for record in opened.records}
        report("kept", json.dumps(kept, separators=(",", ":")))
    report("done", state["step"], stops.count)


def serve(work: Callable[..., None]) -> None:
    """Fork a training for each line of stdin, and report its exit code when it has ended."""
    while line := sys.stdin.readline():
        arguments = json.loads(line)
        log = arguments.pop("log")
        child = os.fork()
        if not child:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            report("pid", os.getpid())
            os._exit(status_of(functools.partial(work, **arguments)))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        report("ended", code)


def status_of(work: Callable[[], None]) -> int:
    """Call ``work``, and return the exit code of a script that does it."""
    warnings.simplefilter("default")
    try:
        work()
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    for module in ("s3fs", "paramiko"):  # Otherwise each child would import it.
        importlib.import_module(module)
    KINDS["sftp"].prepare_client()
    serve(train)
