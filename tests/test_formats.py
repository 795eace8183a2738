"""Payload formats: what is written is read back, by plain readers too; what would run code is refused."""

from __future__ import annotations

import io
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from checkpointer.errors import CorruptError, PolicyError, SaveError, UnsafePayloadError
from checkpointer.formats import open_format

TENSORS = {
    "float": torch.randn(3, 4),
    "half": torch.randn(5).to(torch.bfloat16),
    "scalar": torch.tensor(3),
    "empty": torch.empty(0, 4),
    "strided": torch.arange(12).reshape(3, 4).t(),
    "flag": torch.tensor([True, False]),
}


class Chunks:
    """A write-only stream that remembers how large its pieces were."""

    def __init__(self) -> None:
        self.data = io.BytesIO()
        self.largest = 0

    def write(self, data: Any) -> int:
        self.largest = max(self.largest, memoryview(data).nbytes)
        return self.data.write(data)

    def flush(self) -> None:
        pass


def round_trip(name: str, state: Any) -> Any:
    """Write and read."""
    chunks = Chunks()
    open_format(name).write(state, chunks)
    return open_format(name).read(io.BytesIO(chunks.data.getvalue()), weights_only=True, map_location="cpu")


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal in dtype, shape and every value."""
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


@pytest.mark.parametrize("name", ["torch", "safetensors"])
def test_tensors_round_trip(name: str) -> None:
    """All kinds of dtype, shape and stride."""
    found = round_trip(name, TENSORS)
    assert list(TENSORS) == sorted(found, key=list(TENSORS).index)
    assert all(same(TENSORS[key], found[key]) for key in TENSORS)


def test_optimizer_state_round_trips() -> None:
    """Nested containers and plain values are fine in a torch file."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    state: Any = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": 3,
        "name": "x",
        "shape": (1, 2),
    }
    assert {} == dict(open_format("torch").refused(state))
    found = round_trip("torch", state)
    assert 3 == found["step"]
    assert same(state["optimizer"]["state"][0]["exp_avg"], found["optimizer"]["state"][0]["exp_avg"])


def test_payloads_are_readable_without_this_library(tmp_path: Path) -> None:
    """Plain torch.load and plain safetensors."""
    for name in ("torch", "safetensors"):
        with open(tmp_path / name, "wb") as stream:
            open_format(name).write(TENSORS, stream)
    assert same(TENSORS["half"], torch.load(tmp_path / "torch", weights_only=True)["half"])
    assert same(TENSORS["half"], safetensors.torch.load_file(tmp_path / "safetensors")["half"])


@pytest.mark.parametrize("name", ["torch", "safetensors"])
def test_writing_never_joins_tensors(name: str) -> None:
    """The largest piece a stream sees is the largest tensor: there is no second copy of the state."""
    chunks = Chunks()
    open_format(name).write({str(n): torch.ones(100_000) for n in range(8)}, chunks)
    assert chunks.largest <= 400_000


def test_pickle_bomb_is_refused_and_does_not_run(tmp_path: Path) -> None:
    """The error names what was refused and what would allow it."""
    marker = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.mkdir, (marker,)

    stream = io.BytesIO()
    torch.save({"bomb": Bomb()}, stream)
    stream.seek(0)
    with pytest.raises(UnsafePayloadError, match=r"pathlib.*refuses to unpickle; .*weights_only=False"):
        open_format("torch").read(stream, weights_only=True, map_location="cpu")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["torch", "safetensors"])
@pytest.mark.parametrize("data", [b"", b"garbage", b"\x80\x02garbage", b"PK\x03\x04 cut"])
def test_garbage_is_corrupt(name: str, data: bytes) -> None:
    """Whatever a disk gives back, the error is ours."""
    with pytest.raises(CorruptError, match=r"cannot be read|no torch file"):
        open_format(name).read(io.BytesIO(data), weights_only=True, map_location="cpu")


@dataclass
class Counter:
    """Something a user may put into a state."""

    n: int = 0


def test_refused_values_are_named_by_their_path() -> None:
    """Arrays, dataclasses and functions, wherever they hide; a cycle ends."""
    state: dict[str, Any] = {
        "rng": [np.arange(3)],
        "counter": {"deep": Counter()},
        "fine": OrderedDict(a=torch.ones(1)),
        "function": lambda: None,
    }
    state["self"] = state
    refused = open_format("torch").refused(state)
    assert {"state['rng'][0]", "state['counter']['deep']", "state['function']"} == set(refused)
    assert "test_formats.Counter" == refused["state['counter']['deep']"]


def test_safetensors_says_what_it_cannot_hold() -> None:
    """The key, its type, and where to go."""
    with pytest.raises(SaveError, match=r"state\['optimizer'\] is a dict; .*weights=model.state_dict"):
        round_trip("safetensors", {"optimizer": {}})
    with pytest.raises(SaveError, match="the state is a list"):
        round_trip("safetensors", [])
    with pytest.raises(SaveError, match=r"torch.complex64.*use format='torch'"):
        round_trip("safetensors", {"c": torch.zeros(1, dtype=torch.complex64)})


def test_unknown_format_lists_the_known() -> None:
    """A typo is told at construction."""
    with pytest.raises(PolicyError, match=r"'pickle' is not known \(known: torch, safetensors\)"):
        open_format("pickle")
