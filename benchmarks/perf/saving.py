"""What a save costs: until it is durable, and until the loop goes on."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from perf.builds import Build, workers
from perf.peers import Peer
from perf.rows import OURS, Row, cpu, rows_of
from perf.setup import Setup
from perf.sides import Cost, Side, State, cost_of, drop, folder, interleaved, made_durable, state_of

COPY = "copy into warm buffers"
WRITE = "write + fsync"


def durable(setup: Setup) -> list[Row]:
    """A save in the loop, until it is on the disk; each side keeps one checkpoint, and removes the one before."""
    with folder() as path, workers(setup.trees) as builds:
        state = state_of(setup.megabytes)
        sides: dict[str, Side | str] = {WRITE: _replacing(path, "raw", lambda to: write(state, to))}
        for build in builds:
            sides[build.name] = _opened(build, path, setup.megabytes, 64, None)
        sides["torch.save + fsync"] = _replacing(path, "torch", lambda to: torch.save(state, to))
        for peer in setup.peers:
            sides[f"{peer.name} + fsync"] = _peer_save(peer, state, path)
        taken = interleaved(sides, setup.repeats)
    before = setup.before
    rows = rows_of("blocking save to durable", taken, WRITE, goals={OURS: 0.75})
    goals = {OURS: 0.65} if before else None
    return rows + rows_of("CPU of the whole machine for it", taken, before or WRITE, goals=goals, value=cpu)


def write(state: State, path: str) -> None:
    """Write the bytes of a state, and nothing else."""
    with open(path, "wb", buffering=0) as stream:
        for tensor in state.values():
            view = memoryview(tensor.numpy().data).cast("B")
            while len(view):
                view = view[stream.write(view) :]


def _replacing(path: str, name: str, save: Callable[[str], object]) -> Side:
    """Return a side that saves to a new path, makes that durable, and removes the old one."""
    names = [f"{path}/{name}-0", f"{path}/{name}-1"]

    def replace() -> None:
        save(names[0])
        made_durable(names[0])
        drop(names[1])

    def side() -> Cost:
        cost = cost_of(replace)
        names.reverse()
        return cost

    return side


def _peer_save(peer: Peer, state: State, path: str) -> Side | str:
    save = peer.save
    return save if isinstance(save, str) else _replacing(path, peer.name, lambda to: save(state, to))


def _opened(build: Build, path: str, megabytes: float, tensors: int, background: str | None) -> Side:
    build.call("state", megabytes=megabytes, tensors=tensors)
    build.call("open", where=f"{path}/{build.name}", background=background)
    return build.side("save")


def blocked(setup: Setup) -> list[Row]:
    """How long a background save holds up the loop, for 64 large tensors."""
    return _blocked(setup, setup.megabytes, 64, most=1.1)


def blocked_by_many(setup: Setup) -> list[Row]:
    """The same for very many small tensors."""
    return _blocked(setup, setup.many_tensors / 256, setup.many_tensors, most=1.5)


def _blocked(setup: Setup, megabytes: float, tensors: int, *, most: float) -> list[Row]:
    with folder() as path, workers(setup.trees) as builds:
        state = state_of(megabytes, tensors)
        sides = _copies(state)
        for build in builds:
            sides[build.name] = _opened(build, path, megabytes, tensors, "wait")
        for peer in setup.peers:
            sides[peer.name] = _peer_begin(peer, state, path)
        taken = interleaved(sides, setup.repeats)
    what = f"loop blocked by a background save of {tensors} tensors, {megabytes:.0f} MB"
    return rows_of(what, taken, COPY, goals={OURS: most}, unit="ms", scale=1e3)


def _copies(state: State) -> dict[str, Side | str]:
    buffers = {name: torch.empty_like(tensor) for name, tensor in state.items()}

    def copy() -> None:
        for name, tensor in state.items():
            buffers[name].copy_(tensor)

    return {
        COPY: lambda: cost_of(copy),
        "clone": lambda: cost_of(lambda: {name: tensor.clone() for name, tensor in state.items()}),
    }


def _peer_begin(peer: Peer, state: State, path: str) -> Side | str:
    if isinstance(peer.behind, str):
        return peer.behind
    begin, wait = peer.behind
    target = os.path.join(path, peer.name)

    def side() -> Cost:
        drop(target)
        cost = cost_of(lambda: begin(state, target))
        wait()
        return cost

    return side
