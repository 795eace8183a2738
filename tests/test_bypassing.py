"""Files written past the page cache: the same bytes, wherever and however they are written."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import tempfile
from pathlib import Path
from typing import Any

import mounts
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointer import CheckpointManager, EverySteps, KeepAll, Policy
from checkpointer.errors import SaveError
from checkpointer.storage import bypassing

BLOCK = 8192


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bypassing, "BLOCK", BLOCK)


def is_direct(stream: Any) -> bool:
    """Return whether what is written now goes past the page cache."""
    return bool(fcntl.fcntl(stream.fileno(), fcntl.F_GETFL) & os.O_DIRECT)


def cached_bytes(path: Path) -> int:
    """Return how much of a file lies in the page cache, as util-linux sees it."""
    return int(mounts.sh("fincore", "--bytes", "--noheadings", "--output", "RES", path))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=3 * BLOCK), st.just("flush")), max_size=12))
def test_what_is_written_in_any_pieces_is_what_is_there(pieces: list[bytes | str]) -> None:
    """With flushes in between, after which the file ends in the middle of a block."""
    before = bypassing.BLOCK
    bypassing.BLOCK = BLOCK  # type: ignore[misc]
    try:
        with tempfile.TemporaryDirectory() as folder:
            stream = bypassing.open_payload(f"{folder}/file")
            expected = b""
            for piece in pieces:
                if isinstance(piece, str):
                    stream.flush()
                    assert expected == Path(folder, "file").read_bytes()
                else:
                    assert len(piece) == stream.write(piece)
                    expected += piece
            stream.close()
            assert expected == Path(folder, "file").read_bytes()
    finally:
        bypassing.BLOCK = before  # type: ignore[misc]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_large_payload_on_a_disk_does_not_fill_the_page_cache(tmp_path: Path, kind: str) -> None:
    """So that the other tests mean something: only the end of the file, less than a block, is in the cache."""
    mounts.need("fincore")
    size = 5 * bypassing.BLOCK + 12_345
    mount = {"ext4": mounts.ext4, "xfs": mounts.xfs}[kind]
    with mount(tmp_path) as disk:
        stream = bypassing.open_payload(disk / "file")
        stream.write(bytes(size))
        assert is_direct(stream)
        stream.close()
        assert cached_bytes(disk / "file") < bypassing.BLOCK
        assert bytes(size) == (disk / "file").read_bytes()
        assert cached_bytes(disk / "file") >= size - mmap.PAGESIZE


@pytest.mark.slow
def test_in_memory_and_over_a_network_it_is_an_ordinary_file(tmp_path: Path) -> None:
    """There each write past the cache would be waited for."""
    with mounts.tmpfs(tmp_path) as disk:
        stream = bypassing.open_payload(disk / "file")
        stream.write(bytes(3 * bypassing.BLOCK))
        assert not is_direct(stream)
        stream.close()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("how", ["not turned on", "not written", "in part", "in odd parts"])
def test_a_filesystem_that_refuses_or_takes_less_gets_every_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Whenever it does; a part that is no multiple of a disk's blocks cannot be followed by another past the cache."""
    write, control = os.write, fcntl.fcntl

    def other_write(descriptor: int, data: Any) -> int:
        if not control(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            return write(descriptor, data)
        if how == "not written":
            raise OSError(errno.EINVAL, "no")
        return write(descriptor, data[: 4096 if how == "in part" else 1000])

    def other_control(descriptor: int, command: int, argument: int = 0) -> int:
        if argument & os.O_DIRECT and how == "not turned on":
            raise OSError(errno.EINVAL, "no")
        return control(descriptor, command, argument)

    monkeypatch.setattr(os, "major", lambda device: 1)
    monkeypatch.setattr(os, "write", other_write)
    monkeypatch.setattr(fcntl, "fcntl", other_control)
    data = os.urandom(5 * BLOCK + 100)
    stream = bypassing.open_payload(tmp_path / "file")
    for start in range(0, len(data), 5000):
        stream.write(data[start : start + 5000])
    stream.close()
    assert data == (tmp_path / "file").read_bytes()


@pytest.mark.slow
def test_a_disk_that_fills_up_within_a_large_payload_is_an_error_and_keeps_the_older_one(tmp_path: Path) -> None:
    """What did not fit is given back, and the next save, which fits, works."""
    state = {"w": torch.zeros(2_000_000)}
    with mounts.ext4(tmp_path, 32 * mounts.MIB) as disk:
        manager = CheckpointManager(disk / "run", Policy(EverySteps(1), [KeepAll()]), state=lambda: state)
        assert manager.observe({}, step=1, epoch=0)
        state["w"] = torch.zeros(6_000_000)
        with pytest.raises(SaveError, match="No space left on device"):
            manager.observe({}, step=2, epoch=0)
        state["w"] = torch.ones(2_000_000)
        assert manager.observe({}, step=3, epoch=0)
        manager.close()
        with CheckpointManager(disk / "run") as reader:
            assert [1, 3] == [record.step for record in reader.records]
            restored = reader.restore()
            assert restored is not None
            assert torch.equal(state["w"], restored.state["w"])
