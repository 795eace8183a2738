"""What a payload holds, found out without unpickling it: right for what torch writes, harmless for anything else."""

from __future__ import annotations

import collections
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy
from checkpointer.errors import CheckpointerError, CorruptError
from checkpointer.formats import open_format
from checkpointer.formats.inspection.payload import open_contents, open_stream
from checkpointer.formats.inspection.pickle import Call, Global, read_pickle
from checkpointer.storage import LocalStorage
from checkpointer.testing import MemoryStorage

BASE = torch.arange(12)
TENSORS: dict[str, torch.Tensor] = {
    **{str(dtype): torch.ones(2, 3, dtype=dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16)},
    **{str(dtype): torch.ones(5, dtype=dtype) for dtype in (torch.int8, torch.bool, torch.complex64, torch.uint16)},
    "float8": torch.ones(3).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "transposed": BASE.reshape(3, 4).t(),
    "slice": BASE[3:9:2],
    "expanded": torch.tensor([1.0]).expand(4),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "buffer": torch.nn.Buffer(torch.zeros(2)),
}


def saved(value: Any, **kw: Any) -> MemoryStorage:
    """Return a storage with the value as a torch file."""
    stream = io.BytesIO()
    torch.save(value, stream, **kw)
    return stored(stream.getvalue())


def stored(data: bytes) -> MemoryStorage:
    """Return a storage with these bytes."""
    storage = MemoryStorage()
    storage.write("a.ckpt", data)
    return storage


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", TENSORS)
def test_every_kind_of_tensor_is_read_as_torch_reads_it(name: str, zipped: bool) -> None:
    """Values, shape and dtype, views included, from both kinds of torch file."""
    expected = TENSORS[name]
    storage = saved({"x": expected, "y": BASE}, _use_new_zipfile_serialization=zipped)
    with open_contents(storage, "a.ckpt") as contents:
        info, found = contents.tensors["x"], contents.read("x")
        assert [] == list(contents.problems())
    assert (str(expected.dtype), tuple(expected.shape)) == (f"torch.{info.dtype}", info.shape)
    assert expected.dtype == found.dtype
    assert torch.equal(expected.float() if name == "float8" else expected, found.float() if name == "float8" else found)


@pytest.mark.skipif(not hasattr(torch.serialization, "set_crc32_options"), reason="this torch always writes a CRC32")
def test_a_file_without_checksums_is_looked_into_and_restored(tmp_path: Path) -> None:
    """``torch.serialization.set_crc32_options(False)`` saves time; zip tools take such a file for a damaged one."""
    state: dict[str, Any] = {"w": torch.arange(6.0), "n": 3}
    torch.serialization.set_crc32_options(False)
    try:
        with CheckpointManager(tmp_path, Policy(EverySteps(1), [KeepLast(1)]), state=lambda: state) as manager:
            manager.observe({}, step=1, epoch=0)
            restored = manager.restore()
    finally:
        torch.serialization.set_crc32_options(True)
    assert restored is not None
    assert 3 == restored.state["n"]
    name = restored.record.name
    with zipfile.ZipFile(tmp_path / name) as archive:
        assert {0} == {member.CRC for member in archive.infolist()}
    with open_contents(LocalStorage(tmp_path, "x"), name) as contents:
        assert torch.equal(state["w"], contents.read("w"))


def test_a_pickle_whose_checksum_differs_is_damage() -> None:
    """Where there is one."""
    storage = saved({"w": torch.ones(3), "note": "plain text"})
    data = storage.open("a.ckpt").read()
    with (
        pytest.raises(CorruptError, match=r"archive/data\.pkl is not what was written"),
        open_contents(stored(data.replace(b"plain text", b"other text")), "a.ckpt"),
    ):
        pass


def test_nested_containers_are_named_by_their_keys() -> None:
    """As a person would index them; what is plain is shown, what is tied counts under each name."""
    w = torch.ones(2)
    state = {
        "model": collections.OrderedDict(a=w, b=w),
        "list": [w, {"deep": (w, 1)}],
        7: w,
        "numbers": (1, 2, 3),
        "text": "x",
        "none": None,
        "count": collections.Counter("aab"),
    }
    with open_contents(saved(state), "a.ckpt") as contents:
        assert ["model.a", "model.b", "list.0", "list.1.deep.0", "7"] == list(contents.tensors)
        others = {"list.1.deep.1": 1, "numbers": [1, 2, 3], "text": "x", "none": None, "count.a": 2, "count.b": 1}
        assert others == contents.others


def test_optimizer_module_and_whole_object_are_looked_into() -> None:
    """torch.save(model) pickles the object itself: its class is named, its tensors are found."""
    model = torch.nn.Linear(2, 1)
    with open_contents(saved(model), "a.ckpt") as contents:
        assert {(1, 2), (1,)} == {info.shape for info in contents.tensors.values()}
        assert "torch.nn.modules.linear.Linear" in contents.calls


def test_safetensors_are_looked_into_by_their_header() -> None:
    """The same answers from the other format."""
    stream = io.BytesIO()
    state = {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)}
    open_format("safetensors").write(state, stream)
    with open_contents(stored(stream.getvalue()), "a.ckpt") as contents:
        assert {("w", "float32", (2, 3), 24), ("n", "int64", (), 8)} == {
            (info.name, info.dtype, info.shape, info.bytes) for info in contents.tensors.values()
        }
        assert torch.equal(state["w"], contents.read("w"))
    with open_contents(stored(stream.getvalue()[:-4]), "a.ckpt") as contents:
        assert ["n ends at byte 32, and the file has 28"] != list(contents.problems()) != []


def test_a_dcp_folder_is_looked_into_by_its_metadata(tmp_path: Path) -> None:
    """Shards are put together again, one tensor at a time."""
    state = {"model": {"w": torch.arange(6.0).reshape(2, 3)}, "step": 7}
    open_format("dcp").write_folder(state, str(tmp_path / "a.dcp"))
    with open_contents(LocalStorage(tmp_path, ""), "a.dcp") as contents:
        assert [("model.w", "float32", (2, 3))] == [(i.name, i.dtype, i.shape) for i in contents.tensors.values()]
        assert ["step"] == list(contents.others)
        assert torch.equal(state["model"]["w"], contents.read("model.w"))  # type: ignore[index]
        assert [] == list(contents.problems())
    os.truncate(next((tmp_path / "a.dcp").glob("*.distcp")), 1)
    with open_contents(LocalStorage(tmp_path, ""), "a.dcp") as contents:
        assert any("which has 1" in problem for problem in contents.problems())


def test_a_trainers_folder_is_the_union_of_its_files(tmp_path: Path) -> None:
    """Hugging Face's checkpoint-N."""
    (tmp_path / "c").mkdir()
    torch.save({"lr": 0.1, "m": torch.ones(2)}, tmp_path / "c" / "optimizer.pt")
    (tmp_path / "c" / "trainer_state.json").write_text("{}")
    with open_contents(LocalStorage(tmp_path, ""), "c") as contents:
        assert ["optimizer.pt: m"] == list(contents.tensors)
        assert {"optimizer.pt: lr": 0.1, "trainer_state.json": "<file>"} == contents.others
        assert torch.equal(torch.ones(2), contents.read("optimizer.pt: m"))


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, call: Any, *args: Any) -> None:
        self.made = call, args

    def __reduce__(self) -> Any:
        return self.made


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_call_in_a_pickle_is_noted_and_not_made(protocol: int, tmp_path: Path) -> None:
    """In every protocol there is."""
    data = pickle.dumps([Evil(os.mkdir, str(tmp_path / "pwned")), {"a": 1}], protocol)
    call, plain = read_pickle(io.BytesIO(data))
    assert isinstance(call, Call)
    assert Global(os.mkdir.__module__, "mkdir") == call.what
    assert (str(tmp_path / "pwned"),) == call.args
    assert {"a": 1} == plain
    assert not (tmp_path / "pwned").exists()


plain_data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=30,
)


@given(plain_data, st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_plain_data_is_read_as_pickle_reads_it(value: Any, protocol: int) -> None:
    """Its answer is pickle's answer, wherever pickle need not call anything."""
    data = pickle.dumps(value, protocol)
    if b"_codecs" in data or b"bytes" in data:
        return  # Old protocols call a function to make bytes.
    assert value == read_pickle(io.BytesIO(data))


WHOLE = {
    zipped: bytes(
        saved({"w": torch.arange(4.0), "s": (1, "a")}, _use_new_zipfile_serialization=zipped).open("a.ckpt").read()
    )
    for zipped in (True, False)
}


@settings(max_examples=300)
@given(st.booleans(), st.data())
def test_damaged_bytes_are_an_error_of_ours_or_harmless(zipped: bool, data: st.DataObject) -> None:
    """Whatever is flipped or cut: no traceback, no hang, no gigabytes."""
    whole = bytearray(WHOLE[zipped])
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))]) if data.draw(st.booleans()) else bytes(whole)
    try:
        with open_contents(stored(cut), "a.ckpt") as contents:
            list(contents.problems())
            for name in contents.tensors:
                contents.read(name)
    except CheckpointerError:
        pass


def hostile_zip(data: bytes, *, compress: bool = False) -> bytes:
    """Return a torch file with this pickle."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        archive.writestr("x/data.pkl", data)
        archive.writestr("x/data/0", b"\0" * 16)
    return stream.getvalue()


def laughs() -> bytes:
    """Return a pickle of a kilobyte that stands for 10 ** 30 entries."""
    level: list[Any] = ["ha"]
    for _ in range(30):
        level = [level] * 10
    return pickle.dumps(level)


def endless() -> bytes:
    """Return a pickle of a list that contains itself."""
    level: list[Any] = [object]
    level.append(level)
    return pickle.dumps(level)


def test_what_refers_to_itself_ends() -> None:
    """Neither a cycle nor lists of lists of one list hang or fill the memory."""
    with open_contents(stored(hostile_zip(endless())), "a.ckpt") as contents:
        assert 2 == len(contents.others)
    with pytest.raises(CorruptError, match="far more entries"), open_contents(stored(hostile_zip(laughs())), "a.ckpt"):
        pass


@pytest.mark.parametrize(
    "key", [b")" + b"\x85" * 400_000, b")" + b"q\x00h\x00\x86" * 100], ids=["deep", "itself twice, a hundred times"]
)
def test_a_key_that_would_take_forever_to_hash_is_refused(key: bytes) -> None:
    """Hashing such a tuple ends the process, or takes longer than anyone waits."""
    with pytest.raises(CorruptError, match="a tuple of more than 1000 items"):
        read_pickle(io.BytesIO(b"\x80\x02}" + key + b"K\x01s."))


def test_extra_state_that_repeats_itself_is_not_taken_for_data() -> None:
    """Its entries are counted, as those of any other list."""
    level: list[Any] = ["ha"]
    for _ in range(15):
        level = [level] * 10
    with pytest.raises(CorruptError, match="far more entries"):
        open_stream(io.BytesIO(pickle.dumps({"_extra_state": level})), "a")


def test_a_tensor_that_reaches_beyond_its_storage_is_refused() -> None:
    """Its bytes would be those of something else."""
    stream = io.BytesIO()
    torch.save({"w": torch.arange(4.0)}, stream)
    with zipfile.ZipFile(stream) as archive:
        pickled = archive.read("archive/data.pkl")
    # 4 elements of float32 become 200 in a storage of 16 bytes.
    forged = pickled.replace(b"K\x04\x85", b"K\xc8\x85")
    assert forged != pickled
    with open_contents(stored(hostile_zip(forged)), "a.ckpt") as contents:
        assert ["w needs 800 bytes of storage '0', which has 16 bytes"] == list(contents.problems())
        with pytest.raises(CorruptError, match="which has not so many"):
            contents.read("w")


def test_a_compressed_torch_file_is_refused() -> None:
    """torch never writes one, and a small file could unfold to terabytes."""
    with (
        pytest.raises(CorruptError, match=r"a\.ckpt: its x/data\.pkl is compressed"),
        open_contents(stored(hostile_zip(pickle.dumps({}), compress=True)), "a.ckpt"),
    ):
        pass
