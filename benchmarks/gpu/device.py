"""The device of a run, and what every section needs of it. The CPU takes its place in a dry run."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

State = dict[str, torch.Tensor]
Taken = TypeVar("Taken")


@dataclass(frozen=True)
class Run:
    """Sizes and limits of one run."""

    device: str
    """``cuda`` or ``cpu``."""
    megabytes: int
    repeats: int
    folder: str
    """On the disk that is written to."""
    until: float
    """When the section should end, by ``time.monotonic``."""

    @property
    def on_cuda(self) -> bool:
        """Whether a GPU takes part; without one it is a dry run."""
        return self.device == "cuda"

    @property
    def is_over(self) -> bool:
        """Whether the section has used its time."""
        return time.monotonic() > self.until

    def synchronize(self) -> None:
        """Wait until the device has done what was asked of it."""
        if self.on_cuda:
            torch.cuda.synchronize()

    def state(self, tensors: int = 64) -> State:
        """Return a state on the device."""
        size = self.megabytes * 2**18 // tensors
        return {f"layer{i}.weight": torch.randn(size, device=self.device) for i in range(tensors)}

    def mark(self) -> Callable[[], float]:
        """Return a function that says when the device got here (seconds). Call it after `synchronize`."""
        if not self.on_cuda:
            now = time.perf_counter()
            return lambda: now
        first = _first_event()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return lambda: first.elapsed_time(event) / 1e3


@functools.cache
def _first_event() -> torch.cuda.Event:
    """Return what the moments on the device are counted from."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    torch.cuda.synchronize()
    return event


def pinned(run: Run, state: Mapping[str, torch.Tensor]) -> State:
    """Return host buffers for a state, in memory that the device can write to directly."""
    return {name: torch.empty_like(t, device="cpu", pin_memory=run.on_cuda) for name, t in state.items()}


def turns(run: Run, sides: Mapping[str, Callable[[], Taken]]) -> dict[str, list[Taken]]:
    """Run the sides in turns, after one round to warm up; after three rounds stop when the section's time is over."""
    found: dict[str, list[Taken]] = {name: [] for name in sides}
    for number in range(run.repeats + 1):
        if number > 3 and run.is_over:
            break
        for name in list(sides)[:: 1 if number % 2 else -1]:
            answer = sides[name]()
            if number:
                found[name].append(answer)
    return found
