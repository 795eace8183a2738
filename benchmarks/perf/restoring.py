"""What a restore costs, from a file that is in the page cache."""

from __future__ import annotations

from collections.abc import Callable

import torch

from perf.builds import workers
from perf.rows import OURS, Row, rows_of
from perf.setup import Setup
from perf.sides import Cost, Side, State, cost_of, folder, interleaved, state_of, touched

EACH_BYTE = "torch.load(mmap), each byte"
MEGABYTES, TENSOR_MEGABYTES = 512, 16
"""At most so large a state, because each side writes its own file first; `performance.FRESH` needs tensors of 16 MB."""


def restored(setup: Setup) -> list[Row]:
    """Into memory, and each page read once afterwards."""
    with folder() as path, workers(setup.trees) as builds:
        state = state_of(*_sizes(setup))
        file = f"{path}/state.pt"
        torch.save(state, file)
        sides: dict[str, Side | str] = {"torch.load": _touching(lambda: torch.load(file, weights_only=True))}
        for build in builds:
            megabytes, tensors = _sizes(setup)
            build.call("state", megabytes=megabytes, tensors=tensors)
            build.call("open", where=f"{path}/{build.name}", background=None)
            build.call("save")
            sides[f"{build.name}, verified"] = build.side("restore")
            sides[f"{build.name}, verify='size'"] = build.side("restore", verify="size")
        sides |= _of_peers(setup, state, path, "")
        taken = interleaved(sides, setup.repeats)
    return rows_of(
        f"restore of {_sizes(setup)[0]} MB into memory", taken, "torch.load", goals={f"{OURS}, verified": 1.3}
    )


def mapped(setup: Setup) -> list[Row]:
    """As a map of the file."""
    with folder() as path, workers(setup.trees) as builds:
        state = state_of(*_sizes(setup))
        file = f"{path}/state.pt"
        torch.save(state, file)

        def load() -> State:
            return torch.load(file, mmap=True, weights_only=True)  # type: ignore[no-any-return]

        sides: dict[str, Side | str] = {EACH_BYTE: lambda: cost_of(lambda: _summed(load()))}
        sides["torch.load(mmap), each page"] = _touching(load)
        for build in builds:
            megabytes, tensors = _sizes(setup)
            build.call("state", megabytes=megabytes, tensors=tensors)
            build.call("open", where=f"{path}/{build.name}", background=None)
            build.call("save")
            sides[f"{build.name}, verified"] = build.side("restore", mmap=True, touch=False)  # It has read each byte.
        sides |= _of_peers(setup, state, path, "mmap")
        taken = interleaved(sides, setup.repeats)
    return rows_of(
        f"restore of {_sizes(setup)[0]} MB as a map of the file", taken, EACH_BYTE, goals={f"{OURS}, verified": 1.2}
    )


def _sizes(setup: Setup) -> tuple[int, int]:
    megabytes = min(setup.megabytes, MEGABYTES)
    return megabytes, max(1, megabytes // TENSOR_MEGABYTES)


def _touching(load: Callable[[], State]) -> Side:
    return lambda: cost_of(lambda: touched(load()))


def _summed(state: State) -> None:
    for tensor in state.values():
        tensor.view(torch.int64).sum()


def _of_peers(setup: Setup, state: State, path: str, how: str) -> dict[str, Side | str]:
    sides: dict[str, Side | str] = {}
    for peer in setup.peers:
        if isinstance(peer.loads, str):
            sides[peer.name] = peer.loads
            continue
        if how not in peer.loads:
            only = "maps the file" if "mmap" in peer.loads else "loads into memory"
            sides[peer.name] = f"it only {only}"
            continue
        sides[peer.name] = _Loading(lambda peer=peer: peer.loads[how](state, f"{path}/{peer.name}"))  # type: ignore[misc]
    return sides


class _Loading:
    """A side that writes in its first turn what it loads, so that what it raises is in the table."""

    def __init__(self, prepare: Callable[[], Callable[[], State]]) -> None:
        self._prepare = prepare
        self._load: Callable[[], State] | None = None

    def __call__(self) -> Cost:
        if self._load is None:
            self._load = self._prepare()
        load = self._load
        return cost_of(lambda: touched(load()))
