"""A save in the background of a training on the device: how long the host waits, the device waits, and what it costs.

One turn is: wait until the device is idle, begin a save, train on until the save is durable.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy
from gpu.device import Run, State, pinned, turns

COPY, OURS = "copy into pinned memory", "torch-checkpointer"
STEPS_AT_LEAST = 5


class Turn(NamedTuple):
    """What one save cost (seconds)."""

    host_s: float
    """Until the loop went on."""
    device_s: float
    """Until the device went on with the next step."""
    lost_s: float
    """How much later the steps up to the end of the save were done."""
    took_s: float
    """Until the save was durable."""


def measured(run: Run) -> list[tuple[str, ...]]:
    """Return the rows of the table."""
    state = run.state()
    step = _step(run)
    alone_s = _seconds_each(run, step, 20 if run.on_cuda else 3)
    buffers = pinned(run, state)
    policy = Policy(EverySteps(1), [KeepLast(1)])
    with CheckpointManager(f"{run.folder}/stall", policy, state=lambda: state, background="wait") as manager:
        numbers = iter(range(1, 10**9))

        def save() -> None:
            manager.observe({}, step=next(numbers), epoch=0, epoch_end=False)

        def ours() -> Turn:
            return _turn(run, save, lambda: _is_idle(manager), step, alone_s)

        def copy() -> Turn:
            return _turn(run, lambda: _copy(state, buffers), lambda: True, step, alone_s)

        found = turns(run, {COPY: copy, OURS: ours})
        gigabytes = sum(tensor.nbytes for tensor in state.values()) / 1e9
        return list(_rows(found, gigabytes, alone_s))


def _is_idle(manager: CheckpointManager) -> bool:
    status = manager.session.background_status
    return status is not None and not status.unfinished


def _step(run: Run) -> Callable[[], object]:
    """Return a step of about 50 ms on a large GPU."""
    width, batch, dtype = (8192, 8192, torch.bfloat16) if run.on_cuda else (64, 16, torch.float32)
    net = torch.nn.Sequential(*[torch.nn.Linear(width, width, device=run.device, dtype=dtype) for _ in range(8)])
    inputs = torch.randn(batch, width, device=run.device, dtype=dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        net(inputs).float().square().mean().backward()
        optimizer.step()

    return step


def _seconds_each(run: Run, step: Callable[[], object], count: int) -> float:
    step()
    run.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        step()
    run.synchronize()
    return (time.perf_counter() - start) / count


def _copy(state: State, buffers: State) -> None:
    for name, tensor in state.items():
        buffers[name].copy_(tensor, non_blocking=True)


def _turn(
    run: Run, begin: Callable[[], object], is_durable: Callable[[], bool], step: Callable[[], object], alone_s: float
) -> Turn:
    """Save once; the host is at most one step ahead of the device, as in a loop that reads its loss."""
    run.synchronize()
    start, before = time.perf_counter(), run.mark()
    begin()
    host_s, after = time.perf_counter() - start, run.mark()
    count, took_s = 0, 0.0
    while count < STEPS_AT_LEAST or not took_s:
        step()
        run.synchronize()
        count += 1
        if not took_s and is_durable():
            took_s = time.perf_counter() - start
    lost_s = time.perf_counter() - start - count * alone_s
    return Turn(host_s, after() - before(), lost_s, took_s)


def _rows(found: dict[str, list[Turn]], gigabytes: float, alone_s: float) -> Iterable[tuple[str, ...]]:
    measures: tuple[tuple[str, Callable[[Turn], float]], ...] = (
        (f"loop blocked by a save of {gigabytes:.1f} GB", lambda turn: turn.host_s),
        ("the device's next step begins after", lambda turn: turn.device_s),
        (f"training lost to the save (a step alone: {alone_s * 1e3:.1f} ms)", lambda turn: turn.lost_s),
        ("durable after", lambda turn: turn.took_s),
    )
    for what, value in measures:
        base = statistics.median(map(value, found[COPY]))
        for who, taken in found.items():
            if who == COPY and what == "durable after":
                continue
            took = statistics.median(map(value, taken))
            each = f", {took / gigabytes * 1e3:.1f} ms/GB"
            ratio = f"{took / base:.2f} x" if base > 0 and what != "durable after" else ""
            yield what, who, f"{took * 1e3:.1f} ms{each}", ratio
            what = ""
