"""Modules with any names: `export` and `load_weights` agree on which tensors are the model, and on their names."""

from __future__ import annotations

import copy
import itertools
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from checkpointer_torch import Loop, load_weights
from support.commands import command
from torch import nn

from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy

pytest.importorskip("safetensors", reason="needs torch-checkpointer[safetensors]")

WEIGHTS: Final = Policy(EverySteps(1), [KeepLast(1)], contents="weights")
TRAINING: Final = Policy(EverySteps(1), [KeepLast(1)])
NAMES: Final = (
    *("a", "0", "1", "10", "w/x", "x: y", "ä", "a#2", "net", "model", "module", "weights", "ema"),
    *("optimizer", "optim_w", "rng", "scaler", "callbacks", "param_groups", "epoch", "n_averaged"),
    *("num_batches_tracked", "model.safetensors"),
)
SHAPES: Final = ((), (0,), (1,), (2,), (2, 3))


def made(seed: int, depth: int = 3) -> nn.Module:
    """Return a module with children and tensors under odd names; some children are compiled."""
    draw, module = random.Random(seed), nn.Module()
    for name in draw.sample(NAMES, draw.randint(1, 3)):
        if hasattr(module, name) or "." in name:
            continue
        if depth and draw.random() < 0.6:
            child: Any = made(draw.randrange(1 << 30), depth - 1)
            wrapped: Any = torch.compile(child) if draw.random() < 0.2 else child
            module.add_module(name, wrapped)
        else:
            module.register_parameter(name, nn.Parameter(torch.rand(draw.choice(SHAPES))))
    if not module.state_dict():
        module.register_buffer("w", torch.rand(2))
    return module


def saved(model: nn.Module, folder: Path) -> Iterator[tuple[str, Path]]:
    """Save a model in each way, and yield the name of the way and the path."""
    state = model.state_dict()
    plain = {"flat": state, "nested": {"state_dict": state, "epoch": 1}, "whole": model}
    for way, content in plain.items():
        torch.save(content, folder / f"{way}.pt")
        yield way, folder / f"{way}.pt"
    for format in ("torch", "safetensors", "dcp"):
        with CheckpointManager(folder / format, WEIGHTS, weights=model.state_dict, format=format) as manager:
            manager.observe({}, 1)
        yield format, folder / format
    with Loop(folder / "loop", TRAINING, model=model) as loop:
        for _ in itertools.chain.from_iterable(loop.batches([0]) for _ in loop.epochs(1)):
            loop.step({})
    yield "loop", folder / "loop"


def without_wrappers(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state under the names that a Loop gives it."""
    return {name.replace("_orig_mod.", ""): value for name, value in state.items()}


@pytest.mark.filterwarnings("ignore:contents='weights'")
@pytest.mark.parametrize("seed", [1, 3, 4, 6])
def test_what_is_exported_and_what_is_loaded_is_the_model_that_was_saved(seed: int) -> None:
    """With dots, slashes, numbers, the usual names of a model, and names of what is beside one; compiled or not."""
    model = made(seed)
    own = model.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        for way, path in saved(model, Path(folder)):
            target = copy.deepcopy(model)
            with torch.no_grad():
                for value in target.state_dict().values():
                    value.fill_(-1)
            load_weights(target, path)
            out = Path(folder, f"{way}.exported.pt")
            ended = command("export", path, *(["last"] if path.is_dir() else []), out)
            assert (way, 0) == (way, ended.code), ended.err
            exported = torch.load(out)
            for expected, got in ((own, target.state_dict()), (without_wrappers(own), without_wrappers(exported))):
                assert (way, [*expected]) == (way, [*got]) or {*expected} == {*got}
                assert (way, True) == (way, all(torch.equal(value, got[name]) for name, value in expected.items()))
            if way != "loop":  # A Loop saves under the names that the model has without a wrapper.
                copy.deepcopy(model).load_state_dict(exported, strict=True)
