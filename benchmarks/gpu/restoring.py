"""A restore straight to the device, beside the loads that verify nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable

import torch

from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy
from gpu.device import Run, State, turns

BASE = "torch.load(map_location)"
MEGABYTES = 4000
"""At most, because there are many sides."""


def measured(run: Run) -> list[tuple[str, ...]]:
    """Return the rows of the table.

    Raises:
        AssertionError: If a byte of the restored state differs, or is not on the device.
    """
    run = dataclasses.replace(run, megabytes=min(run.megabytes, MEGABYTES))
    state = run.state()
    where, file = f"{run.folder}/restore", f"{run.folder}/state"
    with CheckpointManager(where, Policy(EverySteps(1), [KeepLast(1)]), state=lambda: state) as manager:
        manager.observe({}, step=1, epoch=0, epoch_end=False)
        assert manager.last is not None
        written = manager.location(manager.last.name)
    sides = _loads(run, where, written) | _peers(run, state, file)
    _check(run, state, sides)
    found = turns(run, {name: lambda load=load: _timed(run, load) for name, load in sides.items()})  # type: ignore[misc]
    medians = {name: statistics.median(taken) for name, taken in found.items()}
    base = medians[BASE]
    what = f"restore of {run.megabytes} MB to {run.device}"
    return [
        ("" if number else what, name, f"{took:.3f} s", f"{took / base:.2f} x")
        for number, (name, took) in enumerate(medians.items())
    ]


def _loads(run: Run, where: str, file: str) -> dict[str, Callable[[], State]]:
    reader = CheckpointManager(where)

    def restore(**options: object) -> State:
        found = reader.restore(map_location=run.device, **options)  # type: ignore[arg-type]
        assert found is not None
        return found.state  # type: ignore[no-any-return]

    return {
        BASE: lambda: torch.load(file, map_location=run.device, weights_only=True),
        "torch.load(mmap, map_location)": lambda: torch.load(
            file, map_location=run.device, weights_only=True, mmap=True
        ),
        "torch-checkpointer, verified": restore,
        "torch-checkpointer, mmap, verified": lambda: restore(mmap=True),
        "torch-checkpointer, verify='size'": lambda: restore(verify="size"),
    }


def _peers(run: Run, state: State, file: str) -> dict[str, Callable[[], State]]:
    sides: dict[str, Callable[[], State]] = {}
    with contextlib.suppress(ImportError):
        from safetensors.torch import load_file, save_file

        save_file({name: tensor.cpu() for name, tensor in state.items()}, file)
        sides["safetensors"] = lambda: load_file(file, device=run.device)
    with contextlib.suppress(ImportError):
        from fastsafetensors import fastsafe_open

        def load() -> State:
            device = "cuda:0" if run.on_cuda else "cpu"
            with fastsafe_open(file, device=device, nogds=True) as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118

        sides["fastsafetensors"] = load
    return sides


def _check(run: Run, state: State, sides: dict[str, Callable[[], State]]) -> None:
    for name, load in sides.items():
        loaded = load()
        assert loaded.keys() == state.keys(), name
        for key, tensor in loaded.items():
            assert tensor.device.type == run.device, (name, tensor.device)
            assert torch.equal(tensor, state[key]), (name, key)


def _timed(run: Run, load: Callable[[], State]) -> float:
    run.synchronize()
    start = time.perf_counter()
    state = load()
    run.synchronize()
    took = time.perf_counter() - start
    del state
    return took
