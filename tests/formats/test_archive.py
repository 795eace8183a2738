"""The archive: it has the bytes that `torch.save` writes, and each tensor's memory is passed over once."""

from __future__ import annotations

import errno
import io
import pickle
import re
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_snapshot import NAMES, kinds

from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy
from checkpointer.errors import SaveError
from checkpointer.formats import archive, open_format
from checkpointer.storage.digests import DigestWriter
from checkpointer.testing import MemoryStorage

pytestmark = pytest.mark.filterwarnings(
    "ignore:TypedStorage", "ignore:.*[Ss]parse", "ignore:.*nested", "ignore:.*quantiz", "ignore:.*a safe load refuses"
)
# torch cannot fill tensors of these with random numbers, or names no storage for them.
_BARE = {"bits1x8", "bits2x4", "bits4x2", "bits8", "bits16"}
DTYPES = sorted(
    {value for name, value in vars(torch).items() if isinstance(value, torch.dtype) and name not in _BARE}, key=str
)


def of_torch(state: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def of_ours(state: Any, theirs: bytes) -> bytes:
    """Return the file, with the fingerprint that torch gave to its own."""
    identities = re.findall(rb"\d{40}", theirs)
    stream = io.BytesIO()
    archive.save(state, stream, pickle, identity=identities[-1].decode())
    return stream.getvalue()


def same_as_torch(state: Any) -> bool:
    theirs = of_torch(state)
    return theirs == of_ours(state, theirs)


def test_the_installed_torch_is_one_that_the_archive_follows() -> None:
    """If this fails, saves go through torch's own writer: see what ``torch.serialization._save`` does differently."""
    assert archive.is_like_torch()


@pytest.mark.parametrize("name", NAMES)
def test_each_kind_of_value_is_written_as_torch_writes_it(name: str) -> None:
    """Byte for byte, except the fingerprint at the end."""
    assert same_as_torch({name: kinds()[name]})


def test_everything_together_is_written_as_torch_writes_it() -> None:
    """What is shared between the parts is written once."""
    assert same_as_torch(kinds())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_dtype_is_written_as_torch_writes_it(dtype: torch.dtype) -> None:
    """A dtype that torch cannot save is refused with the same error."""
    try:
        tensor = torch.zeros(8, dtype=torch.uint8).view(dtype)
        theirs = of_torch(tensor)
    except Exception as error:
        state = torch.empty(0, dtype=dtype) if "view" in str(error) else None
        if state is not None:
            assert same_as_torch(state)
        return
    assert theirs == of_ours(tensor, theirs)


tensors = st.builds(
    lambda size, start, dtype, kind: _tensor(size, start, dtype, kind),
    st.one_of(st.integers(0, 70), st.sampled_from([16383, 16384, 16385, 300_000])),
    st.integers(0, 3),
    st.sampled_from(
        [torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.complex64, torch.uint8]
    ),
    st.sampled_from(["plain", "view", "scalar", "parameter", "transposed", "storage"]),
)


def _tensor(size: int, start: int, dtype: torch.dtype, kind: str) -> Any:
    tensor = torch.arange(size).to(dtype)
    match kind:
        case "view":
            return tensor[start:]
        case "scalar":
            return torch.tensor(size).to(dtype)
        case "parameter":
            return torch.nn.Parameter(tensor, requires_grad=False)
        case "transposed":
            return tensor.expand(2, size).t()
        case "storage":
            return tensor.untyped_storage()
    return tensor


states = st.recursive(
    st.one_of(tensors, st.integers(), st.text(max_size=5), st.none(), st.binary(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=4), st.tuples(inner, inner)
    ),
    max_leaves=12,
)


@settings(max_examples=60)
@given(states, st.sampled_from([64, 256, 4096]))
def test_any_state_is_written_as_torch_writes_it(state: Any, alignment: int) -> None:
    """At any alignment: each record begins where memory can be mapped."""
    from torch.utils.serialization import config

    before, config.save.storage_alignment = config.save.storage_alignment, alignment
    try:
        assert same_as_torch([state, state])
    finally:
        config.save.storage_alignment = before


def test_a_tensor_of_many_chunks_is_written_as_torch_writes_it() -> None:
    """Around the size of a chunk, and of a piece that is joined with others."""
    sizes = (archive.CHUNK - 1, archive.CHUNK, 2 * archive.CHUNK + 5, (1 << 16) - 1, 1 << 16)
    assert same_as_torch([torch.randint(255, (size,), dtype=torch.uint8) for size in sizes])


@pytest.mark.slow
def test_more_records_than_a_small_directory_holds_are_written_as_torch_writes_them() -> None:
    """From 65535 records on, their number stands elsewhere in the file."""
    assert same_as_torch([torch.tensor(number) for number in range(65_540)])


def test_without_checksums_it_is_still_what_torch_writes() -> None:
    """``torch.serialization.set_crc32_options(False)`` holds here too."""
    torch.serialization.set_crc32_options(False)
    try:
        assert same_as_torch({"w": torch.ones(4)})
    finally:
        torch.serialization.set_crc32_options(True)


def test_the_fingerprint_follows_the_names_and_the_contents() -> None:
    """It has 40 digits, as torch's; the same state has the same."""
    files = []
    for state in ([torch.ones(2)], [torch.ones(2)], [torch.zeros(2)], [torch.ones(2), torch.ones(2)]):
        stream = io.BytesIO()
        archive.save(state, stream, pickle)
        files.append(stream.getvalue())
    first, again, other, longer = files
    assert first == again
    assert 3 == len({re.findall(rb"\d{40}", file)[-1] for file in (first, other, longer)})


def test_zip_tools_find_the_file_whole(tmp_path: Path) -> None:
    """A fresh interpreter's ``zipfile``, and ``unzip`` where there is one."""
    path = tmp_path / "a.ckpt"
    with open(path, "wb") as stream:
        open_format("torch").write(
            {"w": torch.randn(3_000_000), "e": torch.empty(0), "b": torch.ones(3, dtype=torch.bool)}, stream
        )
    subprocess.run([sys.executable, "-m", "zipfile", "-t", path], check=True, capture_output=True)
    if shutil.which("unzip"):
        subprocess.run(["unzip", "-tq", path], check=True, capture_output=True)


def test_the_file_is_mapped_by_torch(tmp_path: Path) -> None:
    """Each tensor begins at a multiple of 64 bytes."""
    path, state = tmp_path / "a.ckpt", {"w": torch.randn(100_000), "v": torch.arange(5)}
    with open(path, "wb") as stream:
        open_format("torch").write(state, stream)
    loaded = torch.load(path, mmap=True, weights_only=True)
    assert all(torch.equal(state[name], loaded[name]) for name in state)
    assert {0} == {tensor.data_ptr() % 64 for tensor in loaded.values()}


class Chunks:
    """A stream that notes which memory it is given."""

    def __init__(self) -> None:
        self.addresses: list[tuple[int, int]] = []

    def write(self, data: Any) -> int:
        if len(data) >= 1 << 16:
            self.addresses.append((np.frombuffer(data, np.uint8).ctypes.data, len(data)))
        return len(data)


def test_the_stream_is_given_the_tensors_own_memory() -> None:
    """In pieces of at most a chunk, one after the other. Only the rest of a tensor is copied, if it is small."""
    tensor, chunks = torch.ones(3 * archive.CHUNK, dtype=torch.uint8), Chunks()
    open_format("torch").write({"w": tensor}, chunks)
    address = tensor.data_ptr()
    for start, size in chunks.addresses:
        assert (address, True) == (start, size <= archive.CHUNK)
        address += size
    assert tensor.data_ptr() + tensor.nbytes - (1 << 16) < address


def test_a_save_takes_less_memory_than_a_few_chunks() -> None:
    """Of 20 000 small tensors too, which are joined before they are written."""
    state = [torch.ones(1024) for _ in range(2000)] + [torch.ones(4_000_000)]
    open_format("torch").write(state, Chunks())
    tracemalloc.start()
    try:
        open_format("torch").write(state, Chunks())
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


class Full:
    """A disk that is full after some bytes."""

    def __init__(self, room: int, error: BaseException) -> None:
        self.room = room
        self.error = error

    def write(self, data: Any) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise self.error
        return len(data)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), RuntimeError("odd")], ids=repr)
@pytest.mark.parametrize("room", [0, 5 << 20])
def test_an_error_of_the_stream_is_raised_as_it_is(error: BaseException, room: int) -> None:
    """torch's own writer would raise another one, about positions in the file."""
    with pytest.raises(type(error)) as caught:
        open_format("torch").write({"w": torch.ones(4_000_000)}, DigestWriter(Full(room, error)))
    assert error is caught.value


def test_a_state_without_its_data_is_not_written() -> None:
    """Within ``torch.serialization.skip_data`` a checkpoint would hold no numbers."""
    archive.is_like_torch()
    with torch.serialization.skip_data(), pytest.raises(SaveError, match="skip_data is active"):
        open_format("torch").write({"w": torch.ones(2)}, io.BytesIO())


def test_another_writer_of_torch_is_used_if_this_one_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that calls its writer differently saves as ever, through its public function."""
    monkeypatch.setattr(archive, "is_like_torch", lambda: False)
    storage = MemoryStorage()
    policy = Policy(EverySteps(1), [KeepLast(1)])
    with CheckpointManager(storage, policy, state=lambda: {"w": torch.arange(3)}) as manager:
        manager.observe({}, step=1, epoch=0)
        restored = manager.restore()
    assert restored is not None
    assert [0, 1, 2] == restored.state["w"].tolist()


def test_a_torch_with_other_parameters_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`_save` is private, so it is tried out once before it is used. Here it calls one method more of its writer."""
    save = torch.serialization._save

    def another(state: Any, writer: Any, *arguments: Any) -> None:
        save(state, writer, *arguments)  # type: ignore[no-untyped-call]
        writer.set_min_version(3)

    monkeypatch.setattr(torch.serialization, "_save", another)
    assert not archive.is_like_torch.__wrapped__()


def test_checksums_are_those_of_zlib_with_and_without_the_fast_library() -> None:
    """A restore checks them with Python's own."""
    stream = io.BytesIO()
    archive.save({"w": torch.arange(9)}, stream, pickle)
    with zipfile.ZipFile(stream) as file:
        assert all(zlib.crc32(file.read(member)) == member.CRC for member in file.infolist())
