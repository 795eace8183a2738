"""The memory that a save adds to the process that trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from perf.builds import Build
from perf.memory import of_peer
from perf.peers import Peer
from perf.rows import OURS, Row, named
from perf.setup import Setup
from perf.sides import first_line, folder

Kind = Literal["blocking", "background"]


def memory(setup: Setup) -> list[Row]:
    """Of a blocking save and of one in the background, each side in a process of its own."""
    size = min(512, setup.megabytes)
    return _rows(setup, "blocking", size, most=64) + _rows(setup, "background", size, most=size + 64)


def _rows(setup: Setup, kind: Kind, size: int, *, most: int) -> list[Row]:
    rows = []
    for who, measure in _sides(setup, kind, size):
        try:
            extra = measure()
        except RuntimeError as error:
            rows.append(Row("", who, f"not run: {first_line(error)}"))
            continue
        goal = f"<= {most} MB: {'reached' if extra <= most else 'missed'}" if who == OURS else ""
        rows.append(Row("", who, f"{extra:.0f} MB", f"state, {size} MB", f"{extra / size:.2f} x", goal))
    return named(f"extra memory of a {kind} save", rows)


def _sides(setup: Setup, kind: Kind, size: int) -> Iterator[tuple[str, Callable[[], float]]]:
    for name in setup.trees:
        yield name, lambda name=name: _of_build(setup, name, kind, size)  # type: ignore[misc]
    for peer in setup.peers:
        yield peer.name, lambda peer=peer: _of_peer(peer, kind, size)  # type: ignore[misc]


def _of_build(setup: Setup, name: str, kind: Kind, size: int) -> float:
    with folder() as path, Build(name, setup.trees[name]) as build:
        build.call("state", megabytes=size, tensors=64)
        background = "wait" if kind == "background" else None
        return float(build.call("extra_memory", where=path, background=background))


def _of_peer(peer: Peer, kind: Kind, size: int) -> float:
    can = peer.save if kind == "blocking" else peer.behind
    if isinstance(can, str):
        raise RuntimeError(can)
    return of_peer(peer.name, size, kind)
