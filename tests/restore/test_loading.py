"""Loading: mapped instead of read, held against the size alone, and fetched from elsewhere once."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from checkpointer import CheckpointManager, EverySteps, HMACKey, KeepLast, Policy, Save
from checkpointer.errors import CorruptError, PolicyError
from checkpointer.testing import MemoryStorage

EACH = Policy(EverySteps(1), [KeepLast(2)])


def save(where: Any, **options: Any) -> CheckpointManager:
    """Save one checkpoint of 100 000 floats, and return a manager that has not looked at it yet."""
    state = {"w": torch.arange(100_000.0), "b": torch.ones(3)}
    with CheckpointManager(where, EACH, state=lambda: state, **options) as manager:
        manager.observe({}, step=1, epoch=0, epoch_end=False)
    return CheckpointManager(where, EACH, **options)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("format", ["torch", "safetensors"])
def test_a_mapped_payload_is_the_same_and_changing_it_leaves_the_file_alone(tmp_path: Path, format: str) -> None:
    """Training goes on in place; the checkpoint must not go along."""
    if format == "safetensors":
        pytest.importorskip("safetensors")
    manager = save(tmp_path, format=format)
    for _ in range(2):
        restored = manager.restore(mmap=True)
        assert restored is not None
        assert torch.equal(torch.arange(100_000.0), restored.state["w"])
        restored.state["w"].zero_()
    plain = manager.restore()
    assert plain is not None
    assert torch.equal(torch.arange(100_000.0), plain.state["w"])


def test_a_mapped_payload_outlives_its_file(tmp_path: Path) -> None:
    """The first save after the restore may retire it."""
    restored = save(tmp_path).restore(mmap=True)
    assert restored is not None
    (tmp_path / restored.record.name).unlink()
    assert torch.equal(torch.arange(100_000.0), restored.state["w"])


@pytest.mark.parametrize("mmap", [False, True])
def test_a_changed_byte_is_found_by_the_digest_and_not_by_the_size(tmp_path: Path, mmap: bool) -> None:
    """``verify="size"`` misses changed bytes, and finds a changed size."""
    manager = save(tmp_path)
    path = tmp_path / "epoch=0-step=1.ckpt"
    flip(path)
    with pytest.raises(CorruptError, match="other bytes than were written"):
        manager.restore(1, mmap=mmap)
    restored = manager.restore(1, mmap=mmap, verify="size")
    assert restored is not None
    assert 1 == int((restored.state["w"] != torch.arange(100_000.0)).sum())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptError, match="bytes, and its record says"):
        manager.restore(1, mmap=mmap, verify="size")


def test_other_values_of_verify_are_refused(tmp_path: Path) -> None:
    """``verify=False`` must not silently be something else."""
    with pytest.raises(PolicyError, match="expected 'full', 'mine' or 'size'"):
        save(tmp_path).restore(verify=False)  # type: ignore[arg-type]


def test_with_a_key_the_size_alone_is_not_enough(tmp_path: Path) -> None:
    """A signature says nothing about bytes that were not read."""
    with pytest.raises(PolicyError, match="bytes are not verified"):
        save(tmp_path, trust=HMACKey(b"0123456789abcdef")).restore(verify="size")


def test_where_nothing_can_be_mapped_it_is_read() -> None:
    """A storage without paths."""
    restored = save(MemoryStorage()).restore(mmap=True)
    assert restored is not None
    assert torch.equal(torch.ones(3), restored.state["b"])


def test_a_torch_file_of_the_old_kind_is_read(tmp_path: Path) -> None:
    """A trainer may have written it; it is not a zip file, which mapping needs."""
    with CheckpointManager(tmp_path, EACH, state=dict) as manager:
        decision = manager.session.decide({}, 1, 0, epoch_end=False)
        assert isinstance(decision, Save)
        torch.save({"w": torch.ones(3)}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
        manager.session.commit(decision, tmp_path / "old.ckpt")
        restored = manager.restore(mmap=True)
    assert restored is not None
    assert torch.equal(torch.ones(3), restored.state["w"])


class Elsewhere(MemoryStorage):
    """A storage with URLs, that counts what is read of payloads."""

    def __init__(self) -> None:
        super().__init__()
        self.num_read = 0

    def url(self, path: str) -> str:
        return f"memory://{path}"

    def open(self, path: str) -> BinaryIO:
        stream = super().open(path)
        return stream if path.startswith(".checkpointer") else _Counted(stream.read(), self)


class _Counted(io.BytesIO):
    def __init__(self, data: bytes, storage: Elsewhere) -> None:
        super().__init__(data)
        self._storage = storage

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self._storage.num_read += len(data)
        return data


def test_what_lies_elsewhere_is_fetched_once() -> None:
    """To verify and to load it takes one reading, after a look at the directory at the end of the file."""
    storage = Elsewhere()
    manager = save(storage)
    restored = manager.restore()
    assert restored is not None
    assert torch.equal(torch.arange(100_000.0), restored.state["w"])
    assert restored.record.size <= storage.num_read < restored.record.size + 2**17
