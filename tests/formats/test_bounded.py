"""Payloads that claim more than they hold, and parts that no writer of payloads makes, are refused by name."""

from __future__ import annotations

import contextlib
import io
import itertools
import random
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.odd_files import (
    Made,
    Named,
    bent_zip,
    dcp_file,
    dcp_metadata,
    legacy_file,
    pickled,
    safetensors_file,
    tensor,
    torch_file,
    zipped,
)

from checkpointer.errors import CorruptError
from checkpointer.formats.dcp_folder import DcpFormat
from checkpointer.formats.inspection.key_search import KeySearch
from checkpointer.formats.inspection.payload import open_contents, open_stream
from checkpointer.formats.inspection.pickle import read_made, read_pickle
from checkpointer.formats.inspection.tensors import Tensors
from checkpointer.formats.inspection.torch_file import TorchContents
from checkpointer.formats.inspection.work_limit import Work
from checkpointer.formats.safetensors_file import SafetensorsFormat
from checkpointer.formats.torch_file import TorchFormat
from checkpointer.storage import open_storage


@contextlib.contextmanager
def opened(data: bytes) -> Iterator[Tensors]:
    """Open a file that is called a.ckpt."""
    with contextlib.closing(open_stream(io.BytesIO(data), "a.ckpt")) as contents:
        yield contents


def restored(data: bytes) -> Any:
    """Load a torch file as a restore does that has no better way."""
    return TorchFormat().read(io.BytesIO(data), weights_only=True, map_location="cpu")


# Zip files


def overlapping() -> bytes:
    """Return a torch file whose last member has the place of another."""
    data = torch_file({"w": tensor()}, {"0": bytes(16), "1": bytes(16)})
    entries = [data.rindex(name) - 46 for name in (b"archive/data/0", b"archive/data/1")]
    places = [struct.unpack_from("<L", data, entry + 42)[0] for entry in entries]
    assert places[0] < places[1]
    at = entries[1] + 42
    return data[:at] + struct.pack("<L", places[0]) + data[at + 4 :]


def longer(by: int) -> bytes:
    """Return a torch file whose tensor has more bytes by the directory, the last of them those of other parts."""
    data = torch_file({"w": tensor()})
    at = data.rindex(b"archive/data/0") - 46
    return data[: at + 20] + struct.pack("<LL", 16 + by, 16 + by) + data[at + 28 :]


ZIPS: dict[str, tuple[Callable[[], bytes], str]] = {
    "compressed": (lambda: zipped(pickled({"w": tensor()}), {"0": bytes(16)}, zipfile.ZIP_DEFLATED), "is compressed"),
    "encrypted": (lambda: bent_zip(torch_file({"w": tensor()}), 8, 1), "is encrypted or a patch"),
    "overlapping": (overlapping, "overlaps what comes after it"),
    "too long": (lambda: longer(1000), "overlaps what comes after it"),
    "cut short": (lambda: bent_zip(torch_file({"w": tensor()}), 20, 8), "is compressed"),
}


@pytest.mark.parametrize("name", ZIPS)
def test_members_that_torch_never_writes_are_refused(name: str) -> None:
    """Compressed, encrypted and overlapping members beside the tensors, when looked at and when restored."""
    make, why = ZIPS[name]
    with (
        pytest.raises(CorruptError, match=rf"a\.ckpt: its archive/.* {why}, which torch\.save never does"),
        opened(make()),
    ):
        pass
    with pytest.raises(CorruptError, match=why):
        restored(make())


def test_a_member_that_is_there_twice_is_refused() -> None:
    """Two readers could see two files."""
    stream = io.BytesIO(torch_file({"w": tensor()}))
    with zipfile.ZipFile(stream, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("archive/data/0", bytes(16))
    with pytest.raises(CorruptError, match="is there twice"), opened(stream.getvalue()):
        pass


def test_a_storage_is_not_read_beyond_its_member() -> None:
    """The header in front of the bytes may be longer than it should be."""
    data = bytearray(torch_file({"w": tensor()}))
    header = data.index(b"archive/data/0") - 30
    data[header + 28 : header + 30] = struct.pack("<H", 200)
    with opened(bytes(data)) as contents, pytest.raises(CorruptError, match=r"a\.ckpt: .*reaches into what comes"):
        contents.read("w")


# Claims


CLAIMS: dict[str, Any] = {
    "shape": tensor(shape=(1 << 40,)),
    "offset": tensor(offset=1 << 40),
    "count": tensor(count=1 << 40),
    "key": tensor(key="1"),
}


@pytest.mark.parametrize("name", CLAIMS)
@pytest.mark.parametrize("make", [torch_file, legacy_file], ids=["zip", "legacy"])
def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(name: str, make: Callable[[Any], bytes]) -> None:
    """Before anything is allocated: it is named by `verify --deep`, and a restore does not unpickle the file."""
    data = make({"w": CLAIMS[name]})
    with opened(data) as contents:
        (problem,) = contents.problems()
        assert problem.startswith("w needs ")
    tracemalloc.start()
    with pytest.raises(CorruptError, match="a tensor needs"):
        restored(data)
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


def test_tensors_that_share_bytes_are_read_so_often_only() -> None:
    """`export` would write a terabyte of a file of 100 kB; a state shares them in memory, as torch does."""
    views = {f"w{number}": tensor(count=500_000, shape=(500_000,)) for number in range(200)}
    with opened(torch_file(views, {"0": bytes(2_000_000)})) as contents:
        assert isinstance(contents, TorchContents)
        assert 1 == len({w.untyped_storage().data_ptr() for w in contents.state().values()})
        with pytest.raises(CorruptError, match="more than 64 times"):
            [contents.read(name) for name in views]


def test_an_expanded_tensor_is_read_up_to_a_bound() -> None:
    """One element may stand for 16 million."""
    fine, huge = (tensor(count=1, shape=(1 << bits,), stride=(0,)) for bits in (24, 40))
    with opened(torch_file({"fine": fine, "huge": huge})) as contents:
        assert (1 << 24,) == contents.read("fine").shape
        with pytest.raises(CorruptError, match="huge repeats 4 bytes"):
            contents.read("huge")


@pytest.mark.parametrize("shape", [(2,) * 65, (1 << 40, 1 << 40), (-1,), (1.5,), ("4",), (1 << 70,), (True, 4)])
def test_a_shape_that_no_tensor_has_is_not_a_tensor(shape: Any) -> None:
    """Its parts are shown as those of any other object."""
    with opened(torch_file({"w": tensor(shape=shape, stride=(1,) * len(shape)), "v": tensor()})) as contents:
        assert ["v"] == [*contents.tensors]


# Pickles


def test_a_number_of_thousands_of_digits_is_not_read() -> None:
    """Python itself cannot print it."""
    with opened(torch_file({"w": tensor(), "large": 10**600, "huge": 10**5000})) as contents:
        assert 10**600 == contents.others["large"]
        assert "<object by a call>" == contents.others["huge"]


def test_keys_that_all_have_one_hash_are_refused() -> None:
    """Each costs a comparison with all others. Python gives -1 and -2 one hash."""
    keys = [*itertools.product((-1, -2), repeat=7)]
    assert 1 == len(set(map(hash, keys)))
    assert 64 == len(read_pickle(io.BytesIO(pickled(dict.fromkeys(keys[:64], 1)))))
    with pytest.raises(CorruptError, match="more than 64 keys"):
        read_pickle(io.BytesIO(pickled(dict.fromkeys(keys, 1))))


@pytest.mark.parametrize("what", [("builtins", "set"), ("builtins", "list"), ("collections", "OrderedDict")])
def test_what_is_copied_is_counted(what: tuple[str, str]) -> None:
    """A list that is written once may be copied by each call."""
    call = Made(Named(*what), ([(number, "a") for number in range(20)],))
    data = pickled([call] * 3)
    assert 3 == len(read_made(io.BytesIO(data), Work(10_000))[0])
    with pytest.raises(CorruptError, match="far more entries"):
        read_made(io.BytesIO(data), Work(1000))


@pytest.mark.parametrize("key", [["0"], [("0",)], None, {"0": 1}, [1.5]], ids=str)
def test_a_legacy_file_with_an_odd_list_of_storages_is_refused(key: Any) -> None:
    """The list is not one of texts."""
    is_fine = key == ["0"]
    if is_fine:
        with opened(legacy_file({"w": tensor()}, key)) as contents:
            assert ["w"] == [*contents.tensors]
        return
    with pytest.raises(CorruptError, match=r"a\.ckpt: its list of storages"), opened(legacy_file({"w": tensor()}, key)):
        pass


@pytest.mark.parametrize("count", [-1, 1 << 60, 5])
def test_a_legacy_file_with_an_odd_count_holds_no_more_than_its_bytes(count: int) -> None:
    """A count that is too large ends at the end of the file."""
    with opened(legacy_file({"w": tensor()}, ("0",), (count,))) as contents:
        assert [0.0] * 4 == contents.read("w").tolist()
    with opened(legacy_file({"w": tensor(shape=(5,), count=5)}, ("0",), (count,))) as contents:
        assert ["w needs 20 bytes of storage '0', which has 16 bytes"] == [*contents.problems()]


# safetensors


@pytest.mark.parametrize("dtype", ["load", "nn", "float32x", "__class__", "F9"])
def test_a_dtype_that_is_none_is_refused_when_it_is_read(dtype: str) -> None:
    """torch has other things of such names."""
    data = safetensors_file({"w": {"dtype": dtype, "shape": [1 << 50], "data_offsets": [0, 0]}})
    with opened(data) as contents, pytest.raises(CorruptError, match=rf"a\.ckpt: w \({dtype}\) cannot be read"):
        contents.read("w")


def test_tensors_of_one_range_and_a_header_beyond_the_file_are_refused() -> None:
    """A file of a megabyte would stand for terabytes."""
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    with (
        pytest.raises(CorruptError, match="'w0' and 'w1' overlap"),
        opened(safetensors_file({f"w{number}": entry for number in range(2)})),
    ):
        pass
    with (
        pytest.raises(CorruptError, match="would have 1000000 bytes, and the file has 10"),
        opened(struct.pack("<Q", 1_000_000) + b"{}"),
    ):
        pass


# DCP


TABLES: dict[str, tuple[dict[str, Any], str]] = {
    "text for a size": ({"size": ("4",)}, "for the size of 'w'; expected a shape"),
    "text for a length": ({"length": "2000"}, "for the length of 'w'; expected a whole number"),
    "a negative length": ({"length": -1}, "for the length of 'w'; expected a whole number"),
    "another name for a dtype": ({"dtype": "nn"}, "refuses to unpickle"),
    "a chunk of other dimensions": ({"chunk": (2, 2)}, "expected 1 offsets and sizes"),
    "a huge index": ({"path": ("w", 10**12)}, "each text or a list index"),
    "a long list": ({"path": ("w", 999_999_999)}, "each text or a list index"),
    "a path that is a number": ({"path": 5}, "each text or a list index"),
    "more than it holds": ({"size": (1 << 40,), "chunk": (1 << 40,)}, r"tensors of \d+ bytes, and its files have"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_dcp_table_that_says_what_cannot_be_is_refused(name: str, tmp_path: Path) -> None:
    """Each value is looked at before DCP gets it, and the message has its place."""
    changes, why = TABLES[name]
    (tmp_path / ".metadata").write_bytes(dcp_file(dcp_metadata(**changes)))
    (tmp_path / "__0_0.distcp").write_bytes(torch_file(tensor()).ljust(2000, b"\0"))
    with pytest.raises(Exception, match=why) as caught:
        DcpFormat().read_folder(str(tmp_path), weights_only=True, map_location="cpu")
    assert "checkpointer" in type(caught.value).__module__


def test_a_dcp_table_that_is_as_dcp_writes_it_is_read(tmp_path: Path) -> None:
    """So that the refusals above have one cause each; and a slice that is compressed is refused too."""
    data = torch_file(tensor())
    (tmp_path / ".metadata").write_bytes(dcp_file(dcp_metadata(length=len(data))))
    (tmp_path / "__0_0.distcp").write_bytes(data)
    state = DcpFormat().read_folder(str(tmp_path), weights_only=True, map_location="cpu")
    assert torch.equal(torch.tensor([1.0, 2, 3, 4]), state["w"])

    data = zipped(pickled(tensor()), {"0": bytes(16)}, zipfile.ZIP_DEFLATED)
    (tmp_path / ".metadata").write_bytes(dcp_file(dcp_metadata(length=len(data))))
    (tmp_path / "__0_0.distcp").write_bytes(data)
    with open_contents(open_storage(tmp_path, ""), "") as contents, pytest.raises(CorruptError, match="is compressed"):
        contents.read("w")


def test_the_steps_to_the_place_of_a_key_are_counted() -> None:
    """As Python takes them: numbers with the same last bits need more. Text and small numbers are not looked at."""
    apart = dict.fromkeys(range(1 << 20, (1 << 20) + 5000))
    alike = {number << 40: None for number in range(5000)}
    assert 0 == KeySearch(apart).steps < 5000 < KeySearch(alike).steps
    assert 0 == KeySearch(set(range(5000))).steps < 5000 < KeySearch(set(alike)).steps
    work = Work(100_000)
    assert apart == read_made(io.BytesIO(pickled(apart)), work)[0]
    with pytest.raises(CorruptError, match="stands for far more entries than its size allows"):
        read_made(io.BytesIO(pickled(alike)), Work(100_000))
    text = {str(number): number for number in range(5000)}
    assert text == read_made(io.BytesIO(pickled(text)), Work(0))[0]


def test_numbers_that_programs_use_as_keys_are_far_from_the_limit() -> None:
    """Random numbers, the addresses of objects, and multiples of large powers of two."""
    chooser = random.Random(1)
    for numbers in (
        [chooser.getrandbits(60) for _ in range(20_000)],
        [140_000_000_000_000 + 64 * number for number in range(20_000)],
        [number << 24 for number in range(20_000)],
    ):
        data = pickled(dict.fromkeys(numbers))
        work = Work.for_bytes(len(data))
        read_made(io.BytesIO(data), work)
        assert work.left > 0.8 * Work.for_bytes(len(data)).left, numbers[1]


def test_a_mapped_safetensors_file_is_checked_too(tmp_path: Path) -> None:
    """Before safetensors itself reads it."""
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for header, why in (
        ({"w": one, "v": one}, "overlap"),
        ({"w": {"dtype": "F32", "shape": [200], "data_offsets": [0, 800]}}, "the file has 16"),
    ):
        path = tmp_path / "a.safetensors"
        path.write_bytes(safetensors_file(header))
        with pytest.raises(CorruptError, match=why):
            SafetensorsFormat().read_mapped(str(path), weights_only=True, map_location="cpu")
