"""A safetensors file is read once: into the final tensors, and digested there."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from safetensors.torch import load, save

from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy
from checkpointer.errors import CorruptError
from checkpointer.formats.archive_reader import OtherLayoutError
from checkpointer.formats.safetensors_one_pass import SafetensorsLayout
from checkpointer.formats.tensor_bytes import memory_of
from checkpointer.storage.pieces import fill
from checkpointer.testing import MemoryStorage

EACH = Policy(EverySteps(1), [KeepLast(3)])
NAME = "epoch=0-step=1.safetensors"


def random_state(chance: random.Random) -> dict[str, torch.Tensor]:
    """Return tensors of many kinds: empty, 0-d, small, large, of several dtypes."""
    dtypes = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn)
    shapes = [(), (0,), (3,), (7, 5), (200, 100), (300, 400), (1200, 1001)]
    numbers = range(chance.randrange(1, 12))
    return {f"t{n}": torch.zeros(chance.choice(shapes)).random_(0, 2).to(chance.choice(dtypes)) for n in numbers}


def saved(where: Any, state: Any) -> CheckpointManager:
    options: dict[str, Any] = {"state": lambda: state, "format": "safetensors"}
    with CheckpointManager(where, EACH, **options) as manager:
        manager.observe({}, step=1, epoch=0, epoch_end=False)
    return CheckpointManager(where, EACH, **options)


def restored(manager: CheckpointManager, **options: Any) -> Any:
    found = manager.restore(**options)
    assert found is not None
    return found.state


def loaded(data: bytes, filled_from: bytes | None = None) -> Any:
    """Load with a layout alone; None if there is none."""
    layout = SafetensorsLayout.of(io.BytesIO(data), is_mapped=False)
    if layout is None:
        return None
    for _ in fill(io.BytesIO(filled_from or data), layout.pieces):
        pass
    return layout.state(weights_only=True, map_location=None)


def same(left: Any, right: Any) -> bool:
    return left.keys() == right.keys() and all(
        a.dtype == right[name].dtype and a.shape == right[name].shape and raw(a) == raw(right[name])
        for name, a in left.items()
    )


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(memory_of(tensor))


@pytest.mark.parametrize("seed", range(6))
def test_what_is_loaded_is_what_safetensors_loads(seed: int, tmp_path: Path) -> None:
    """As a map too. Each tensor in memory has memory of its own, with no more bytes than it needs."""
    state = random_state(random.Random(seed))
    assert same(load(save(state)), loaded(save(state)))
    manager = saved(tmp_path, state)
    assert same(state, restored(manager, mmap=True))
    found = restored(manager)
    assert same(state, found)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in found.values())


class Counting(MemoryStorage):
    """Counts the bytes that are read of payloads."""

    count = 0

    def open(self, path: str) -> BinaryIO:
        counting, data = self, super().open(path).read()

        class Stream(io.BytesIO):
            def read(self, size: int | None = -1, /) -> bytes:
                chunk = super().read(size)
                counting.count += len(chunk) if path == NAME else 0
                return chunk

        return Stream(data)


def test_the_file_is_read_once() -> None:
    """Only its header is read a second time."""
    storage, state = Counting(), {"large": torch.randn(1_000_000), "small": torch.ones(3)}
    manager = saved(storage, state)
    storage.count = 0
    assert same(state, restored(manager))
    assert 4_000_012 < storage.count < 4_002_000


@pytest.mark.parametrize("mmap", [False, True])
def test_one_changed_bit_never_gives_a_state(tmp_path: Path, mmap: bool) -> None:
    """Whether it is in the header or in a tensor."""
    manager = saved(tmp_path, {"layer1.weight": torch.randn(200, 200), "b": torch.ones(5)})
    path, chance = tmp_path / NAME, random.Random(5)
    whole = path.read_bytes()
    for at in (0, 9, len(whole) - 1, *(chance.randrange(200) for _ in range(15)), chance.randrange(len(whole))):
        data = bytearray(whole)
        data[at] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        with pytest.raises(CorruptError, match="other bytes than were written"):
            manager.restore(1, mmap=mmap)
    path.write_bytes(whole)
    assert restored(manager, mmap=mmap)["b"].sum() == 5


def test_another_header_than_the_one_that_was_read_first_is_noticed() -> None:
    """The file was replaced meanwhile: its tensors would be taken apart at the wrong places."""
    one, other = save({"a": torch.ones(4)}), save({"b": torch.ones(4)})
    assert len(one) == len(other)
    with pytest.raises(OtherLayoutError):
        loaded(one, filled_from=other)


@pytest.mark.parametrize("shift", [0, 1])
def test_unusual_files_are_loaded_too(tmp_path: Path, shift: int) -> None:
    """Bytes between the tensors belong to none of them, and a tensor may begin at an odd place."""
    numbers = torch.arange(30_000.0)
    header = json.dumps({"w": {"dtype": "F32", "shape": [30_000], "data_offsets": [5, 120_005]}}).encode()
    header += b" " * (-len(header) % 8 + shift)
    data = len(header).to_bytes(8, "little") + header + b"12345" + raw(numbers) + b"67"
    assert same({"w": numbers}, loaded(data))
    layout = SafetensorsLayout.of(io.BytesIO(data), is_mapped=False)
    assert layout is not None
    assert [0, len(data)] == [layout.pieces[0][0], sum(len(view) for _, view in layout.pieces)]


def test_a_damaged_header_has_no_layout() -> None:
    """The digest says that it is damaged, and the format says how."""
    data = save({"w": torch.ones(3)})
    assert None is loaded(data[:-1])
    assert None is loaded(b"\xff" * 8 + data[8:])
