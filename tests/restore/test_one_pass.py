"""A torch file is read once: into the final tensors, digested there, and unpickled only if it is what was written."""

from __future__ import annotations

import io
import os
import random
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from checkpointer import CheckpointManager, EverySteps, HMACKey, KeepLast, Policy, Save
from checkpointer._parallel import ahead
from checkpointer.errors import CorruptError, NoValidCheckpointError, UnsafePayloadError
from checkpointer.formats.archive_reader import Archive, start_of
from checkpointer.formats.mapped_memory import HUGE_PAGE, can_map
from checkpointer.formats.torch_file import TorchFormat
from checkpointer.formats.torch_one_pass import TorchLayout, can_unpickle
from checkpointer.restore.damaged_tensors import damage_in
from checkpointer.storage.pieces import fill
from checkpointer.testing import MemoryStorage

EACH = Policy(EverySteps(1), [KeepLast(3)])
NAME = "epoch=0-step=1.ckpt"


def bytes_of(state: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


class ByTorch(TorchFormat):
    """Writes what torch itself writes, and our own writer may refuse."""

    def write(self, state: Any, stream: Any) -> None:
        torch.save(state, stream)


def archive_of(data: bytes) -> Archive | None:
    return Archive.of(io.BytesIO(data))


def loaded(data: bytes) -> Any:
    """Load with a layout alone; an error unless it can."""
    layout = TorchLayout.of(io.BytesIO(data), is_mapped=False)
    assert layout is not None
    for _ in fill(io.BytesIO(data), layout.pieces):
        pass
    return layout.state(weights_only=True, map_location="cpu")


def random_state(chance: random.Random) -> dict[str, Any]:
    """Return tensors of many kinds: shared, empty, views, 0-d, small, large, of several dtypes."""
    dtypes = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64)
    state: dict[str, Any] = {"step": chance.randrange(9), "names": ["a", ("b", None)]}
    for number in range(chance.randrange(1, 12)):
        shape = chance.choice([(), (0,), (3,), (7, 5), (200, 100), (300, 400)])
        state[f"t{number}"] = torch.zeros(shape).random_(0, 2).to(chance.choice(dtypes))
    base = torch.arange(60_000.0)
    state["views"] = OrderedDict(whole=base, part=base[100:200], turned=base.view(200, 300).T)
    return state


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.stride() == right.stride() and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return bool(left == right)


def saved(where: Any, state: Any, **options: Any) -> CheckpointManager:
    with CheckpointManager(where, EACH, state=lambda: state, **options) as manager:
        manager.observe({}, step=1, epoch=0, epoch_end=False)
    return CheckpointManager(where, EACH, **options)


def test_the_installed_torch_can_be_used_this_way() -> None:
    """Without these private functions every restore would silently take twice as long."""
    assert can_unpickle()


@pytest.mark.parametrize("seed", range(8))
def test_what_is_loaded_is_what_torch_loads(seed: int) -> None:
    """Values, dtypes, strides and shared memory, without the fallback to torch.load."""
    state = random_state(random.Random(seed))
    expected = torch.load(io.BytesIO(bytes_of(state)), weights_only=True)
    assert same(expected, loaded(bytes_of(state)))
    views = loaded(bytes_of(state))["views"]
    assert views["whole"].untyped_storage().data_ptr() == views["part"].untyped_storage().data_ptr()


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("trust", [None, HMACKey(b"0123456789abcdef")], ids=["plain", "trusted"])
def test_one_changed_bit_never_gives_a_state(tmp_path: Path, mmap: bool, trust: HMACKey | None) -> None:
    """Wherever it is; and if it is in a tensor, the error names the tensor."""
    state = {"model": {"layer1.weight": torch.randn(200, 200), "b": torch.ones(5)}, "step": 3}
    manager = saved(tmp_path, state, trust=trust)
    path = tmp_path / NAME
    whole = path.read_bytes()
    archive = archive_of(whole)
    assert archive is not None
    member = {m.name: m for m in archive.members}
    chance = random.Random(5)
    places = [chance.randrange(len(whole)) for _ in range(25)]
    for at in (member["data/0"].start, member["data/0"].end - 1, *places):
        data = bytearray(whole)
        data[at] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        with pytest.raises(CorruptError, match="other bytes than were written") as caught:
            manager.restore(1, mmap=mmap)
        is_in = member["data/0"].start <= at < member["data/0"].end
        assert is_in == ("model.layer1.weight (data/0) is damaged" in str(caught.value))
    path.write_bytes(whole)
    restored = manager.restore(1, mmap=mmap)
    assert restored is not None
    assert same(state, restored.state)


def test_damage_is_named_wherever_it_is() -> None:
    """In a tensor, in two tensors that share memory, in the pickle, in the directory, and between the parts."""
    base = torch.arange(1000.0)
    data = bytes_of({"a": base, "b": base[5:], "c": torch.ones(9)})
    archive = archive_of(data)
    assert archive is not None
    member = {m.name: m for m in archive.members}

    def damaged(*places: int) -> str:
        changed = bytearray(data)
        for at in places:
            changed[at] ^= 4
        return damage_in(io.BytesIO(changed))

    assert damaged(member["data/0"].start) == "a, b (data/0) is damaged"
    assert damaged(member["data/0"].start, member["data/1"].start) == "a, b (data/0), c (data/1) are damaged"
    assert "its structure (data.pkl) is damaged" == damaged(member["data.pkl"].start + 9)
    assert "the directory at its end is damaged" == damaged(len(data) - len(archive.directory))
    assert "the headers of data/1 are damaged" == damaged(member["data/1"].header)
    assert "the damage lies between its tensors, and all of them are whole" == damaged(member["data/0"].start - 1)


def test_without_checksums_no_tensor_is_named() -> None:
    """torch.serialization.set_crc32_options(False) writes zeros."""
    computed = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        data = bytearray(bytes_of({"a": torch.ones(1000)}))
    finally:
        torch.serialization.set_crc32_options(computed)
    data[len(data) // 2] ^= 1
    assert "" == damage_in(io.BytesIO(data)) or "data/0 have no checksum" in damage_in(io.BytesIO(data))


def test_a_truncated_or_boastful_directory_allocates_nothing() -> None:
    """Each number in it is compared with the file before any memory is asked for."""
    data = bytes_of({"a": torch.ones(1000), "b": torch.ones(30_000)})
    archive = archive_of(data)
    assert archive is not None
    start = len(data) - len(archive.directory)
    for cut in (0, 1, 21, 22, 100, start, len(data) - 1):
        assert archive_of(data[:cut]) is None
    chance = random.Random(7)
    for _ in range(400):
        changed = bytearray(data)
        at = chance.randrange(start, len(data) - 4)
        changed[at : at + 4] = chance.choice([b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\0\0\0\0"])
        found = archive_of(bytes(changed))
        if found is not None:
            assert sum(member.size for member in found.members) <= len(data)
            assert all(0 <= member.header < member.start <= member.end <= len(data) for member in found.members)


def test_members_lie_where_torch_says() -> None:
    """Also where a header has the fields for more than 4 GB."""
    data = bytes_of({"w": torch.ones(3)})
    reader: Any = torch._C.PyTorchFileReader(io.BytesIO(data))
    for header, name, size in [(0, 8, 5), (77, 30, 2**33), (2**32 - 1, 9, 5), (2**34 + 3, 21, 2**35)]:
        expected = reader.get_record_offset_no_read(header, "x" * name, size, 64)
        assert expected == start_of(header, name + len("archive/"), size)


def test_a_zip_that_torch_lays_out_otherwise_is_still_restored(tmp_path: Path) -> None:
    """Another alignment, or another program's zip: it is read twice, as other formats are."""
    data = zipfile.ZipFile(io.BytesIO(bytes_of({"w": torch.arange(50_000.0)})))
    with CheckpointManager(tmp_path, EACH, state=dict) as manager:
        decision = manager.session.decide({}, 1, 0, epoch_end=False)
        assert isinstance(decision, Save)
        with zipfile.ZipFile(tmp_path / "other.ckpt", "w") as other:
            for info in data.infolist():
                other.writestr(info.filename, data.read(info))
        manager.session.commit(decision, tmp_path / "other.ckpt")
        for mmap in (False, True):
            restored = manager.restore(mmap=mmap)
            assert restored is not None
            assert torch.equal(torch.arange(50_000.0), restored.state["w"])


@pytest.mark.skipif(not can_map(), reason="this system cannot read mapped pages ahead")
def test_a_mapped_file_that_is_replaced_keeps_its_tensors(tmp_path: Path) -> None:
    """The pages are those of the file that was verified, not of the name."""
    restored = saved(tmp_path, {"w": torch.arange(100_000.0)}).restore(mmap=True)
    assert restored is not None
    other = tmp_path / "other"
    other.write_bytes(b"x" * (tmp_path / NAME).stat().st_size)
    os.replace(other, tmp_path / NAME)
    assert torch.equal(torch.arange(100_000.0), restored.state["w"])


class Replaced(MemoryStorage):
    """A storage whose payload is another one after its directory was read."""

    other = b""

    def open(self, path: str) -> BinaryIO:
        stream = super().open(path)
        return stream if path.startswith(".checkpointer") or not self.other else _Replaced(stream.read(), self.other)


class _Replaced(io.BytesIO):
    def __init__(self, data: bytes, other: bytes) -> None:
        super().__init__(data)
        self._other = other

    def seek(self, offset: int, whence: int = 0, /) -> int:
        if self.tell() == len(self.getvalue()) > 0 and not offset:
            self.getbuffer()[:] = self._other
        return super().seek(offset, whence)


def test_a_file_that_is_replaced_after_its_directory_was_read_is_refused(tmp_path: Path) -> None:
    """The digest is of the bytes that are in the tensors."""
    storage = Replaced()
    manager = saved(storage, {"w": torch.arange(1000.0)})
    storage.other = bytes_of({"w": torch.zeros(1000)})[: manager.records[0].size].ljust(manager.records[0].size, b"\0")
    with pytest.raises(CorruptError, match="other bytes than were written"):
        manager.restore(1)


def test_what_a_safe_load_refuses_is_named_as_before(tmp_path: Path) -> None:
    """The pickle is looked at only after the digest was right."""
    with CheckpointManager(tmp_path, EACH, state=lambda: {"path": Path("x")}) as manager, pytest.warns(match="Path"):
        manager.observe({}, step=1, epoch=0, epoch_end=False)
    manager = CheckpointManager(tmp_path, EACH)
    with pytest.raises(UnsafePayloadError, match=r"pathlib.* which a safe load refuses"):
        manager.restore(1)
    restored = manager.restore(1, weights_only=False)
    assert restored is not None
    assert {"path": Path("x")} == restored.state


def test_an_error_of_a_thread_ends_the_reading() -> None:
    """And no thread goes on into memory that is freed."""

    def act(number: int) -> None:
        if number == 40:
            msg = "the disk is gone"
            raise OSError(msg)

    with pytest.raises(OSError, match="the disk is gone"):
        list(ahead(act, 100))
    assert list(range(1, 101)) == list(ahead(lambda number: None, 100))


def test_many_small_tensors_are_loaded() -> None:
    """Each gets memory of its own, so that one of them does not keep all."""
    state = {str(number): torch.full((20,), float(number)) for number in range(3000)}
    found = loaded(bytes_of(state))
    assert same(state, found)
    assert 80 == found["7"].untyped_storage().nbytes()


def test_two_threads_never_make_the_same_huge_page() -> None:
    """Both would fill it with zeros, and one of the two would be thrown away."""
    layout = TorchLayout.of(io.BytesIO(bytes_of({"w": torch.zeros(5_000_000)})), is_mapped=False)
    assert layout is not None
    large = [view for _, view in layout.pieces if len(view) > HUGE_PAGE]
    ends = [torch.frombuffer(view, dtype=torch.uint8).data_ptr() + len(view) for view in large]
    assert len(ends) > 3
    assert {0} == {end % HUGE_PAGE for end in ends[:-1]}


def test_a_tensor_that_is_larger_than_its_storage_is_refused(tmp_path: Path) -> None:
    """torch would make the storage larger, with whatever the memory holds; plain torch.load refuses it too."""
    tensor = torch.full((100,), 7.0)
    tensor.untyped_storage().resize_(8)
    with CheckpointManager(tmp_path, EACH, state=lambda: {"w": tensor}, format=ByTorch()) as manager:
        manager.observe({}, step=1, epoch=0)
    with pytest.raises(NoValidCheckpointError, match="needs 400 bytes of storage '0', which has 8"):
        CheckpointManager(tmp_path).restore()
