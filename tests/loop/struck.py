"""A training in a process group of its own, that gets signals from outside, as a scheduler sends them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import torch
from checkpointer_torch import Loop
from small import Points, Small
from support.grouped import Wait, in_group
from torch.utils.data import DataLoader

from checkpointer import EverySteps, KeepLast, Policy

POLICY = Policy(EverySteps(1000), [KeepLast(1)])


@attrs.frozen(kw_only=True)
class Kind:
    """What differs between the trainings."""

    where: str
    """The place at which the signal comes: ``within`` a step, ``after`` it, in a ``save`` or in a ``validation``."""
    step: int = 5
    start: str = "fork"
    """How workers are started."""
    persistent: bool = False
    watched: bool = False
    """Whether the validation iterates over `Loop.validation`."""


class Place:
    """Where the training waits for the signal."""

    def __init__(self, wait: Wait, kind: Kind) -> None:
        self.wait, self.kind = wait, kind

    def reach(self, where: str, step: int) -> None:
        if (where, step) == (self.kind.where, self.kind.step):
            self.wait()


class Slow:
    """State whose taking is a place of its own."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        self.place.reach("save", self.step)
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def train(wait: Wait, directory: Path, kind: Kind) -> str:
    """Train two epochs of seven steps, each with a validation; return a digest of all that is random."""
    place = Place(wait, kind)
    small = Small(workers=2, persistent=kind.persistent)
    measured = DataLoader(Points(24), 4, shuffle=True, num_workers=2, multiprocessing_context=kind.start)
    small.loader.multiprocessing_context = kind.start
    slow = Slow(place)
    policy = Policy(EverySteps(5), [KeepLast(1)]) if kind.where == "save" else POLICY
    with Loop(directory, policy, **small.objects, slow=slow) as loop:
        loop.resume()
        for _ in loop.epochs(2):
            for batch in loop.batches(small.loader):
                slow.step = loop.progress.step + 1
                small.learn(batch)
                place.reach("within", slow.step)
                loop.step()
                place.reach("after", slow.step)
            losses = []
            batches: Iterator[Any] = loop.validation(measured) if kind.watched else iter(measured)
            for batch in batches:
                place.reach("validation", slow.step)
                losses.append(float(batch[0].mean()) + float(torch.rand(1)))
            loop.report({"val": sum(losses)})
    return small.digest()


def strike(directory: Path, kind: Kind, number: int | None = signal.SIGTERM) -> tuple[int, str]:
    """Train, and send the signal to the group when it has come to the place; return the exit code and the digest."""
    code, digest = in_group(train, directory, kind, number=number)
    return code, digest or ""
