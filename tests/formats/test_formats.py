"""Payload formats: what is written is read back, by plain readers too; what would run code is refused."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import safetensors.torch
import torch

from checkpointer.errors import CorruptError, PolicyError, SaveError, UnsafePayloadError
from checkpointer.formats import open_format
from checkpointer.formats.inspection.payload import open_contents
from checkpointer.storage import LocalStorage
from checkpointer.storage.digests import DigestWriter

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

    def __init__(self, data: io.BytesIO | None = None) -> None:
        self.data = io.BytesIO() if data is None else data
        self.largest = 0

    def write(self, data: Any) -> int:
        self.largest = max(self.largest, memoryview(data).nbytes)
        return self.data.write(data)

    def flush(self) -> None:
        pass


def round_trip(name: Literal["torch", "safetensors"], state: Any) -> Any:
    """Write and read."""
    chunks = Chunks()
    open_format(name).write(state, chunks)
    return open_format(name).read(io.BytesIO(chunks.data.getvalue()), weights_only=True, map_location="cpu")


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal in dtype, shape and every value."""
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


@pytest.mark.parametrize("name", ["torch", "safetensors"])
def test_tensors_round_trip(name: Literal["torch", "safetensors"]) -> None:
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
def test_writing_never_joins_tensors(name: Literal["torch", "safetensors"]) -> None:
    """The largest piece a stream sees is the largest tensor: there is no second copy of the state."""
    chunks = Chunks()
    open_format(name).write({str(n): torch.ones(100_000) for n in range(8)}, chunks)
    assert chunks.largest <= 400_000


@pytest.mark.parametrize("name", ["torch", "safetensors"])
def test_digest_is_of_what_was_written(name: Literal["torch", "safetensors"]) -> None:
    """The stream that the manager writes through takes whatever memory a format hands it."""
    stream = io.BytesIO()
    writer = DigestWriter(stream)
    open_format(name).write(TENSORS, writer)
    whole = DigestWriter(io.BytesIO())
    whole.write(stream.getvalue())
    assert (whole.size, whole.digest) == (writer.size, writer.digest)


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


class Bomb:
    """Would create a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.marker,)


def test_older_and_newer_pickle_bombs_are_refused(tmp_path: Path) -> None:
    """A bare pickle and torch's file before zip name what they hold; newer protocols name the instruction."""
    bomb = Bomb(tmp_path / "ran")
    bare, legacy, newer = io.BytesIO(pickle.dumps(bomb, protocol=2)), io.BytesIO(), io.BytesIO()
    torch.save({"bomb": bomb}, legacy, _use_new_zipfile_serialization=False)
    torch.save({"bomb": bomb}, newer, pickle_protocol=4)
    for stream in (bare, legacy):
        stream.seek(0)
        with pytest.raises(UnsafePayloadError, match=r"holds (getattr|pathlib\S+), which .* refuses to unpickle"):
            open_format("torch").read(stream, weights_only=True, map_location="cpu")
    newer.seek(0)
    with (
        pytest.warns(UserWarning, match="Detected pickle protocol 4"),
        pytest.raises(UnsafePayloadError, match=r"Unsupported operand \d+\), which a safe load refuses"),
    ):
        open_format("torch").read(newer, weights_only=True, map_location="cpu")
    assert not bomb.marker.exists()


def test_trusted_payload_is_read_whole() -> None:
    """weights_only=False is what the error says it is."""
    stream = io.BytesIO()
    open_format("torch").write({"counter": Counter(3)}, Chunks(stream))
    stream.seek(0)
    assert {"counter": Counter(3)} == open_format("torch").read(stream, weights_only=False, map_location="cpu")


@pytest.mark.parametrize("name", ["torch", "safetensors"])
def test_every_truncation_is_corrupt(name: Literal["torch", "safetensors"], tmp_path: Path) -> None:
    """Wherever the file ends, from memory and from disk."""
    chunks = Chunks()
    open_format(name).write({"w": torch.randn(50), "b": torch.ones(3)}, chunks)
    data = chunks.data.getvalue()
    for size in range(0, len(data), 13):
        (tmp_path / "cut").write_bytes(data[:size])
        with open(tmp_path / "cut", "rb") as file:
            for stream in (io.BytesIO(data[:size]), file):
                with pytest.raises(CorruptError, match=r"cannot be read|not a torch file"):
                    open_format(name).read(stream, weights_only=True, map_location="cpu")


def test_damaged_legacy_pickle_is_corrupt() -> None:
    """Every way in which torch's unpickler stumbles is one error of ours: IndexError, struct.error, AssertionError."""
    stream = io.BytesIO()
    torch.save({"w": torch.ones(5)}, stream, _use_new_zipfile_serialization=False)
    for position in range(0, len(stream.getvalue()), 7):
        with pytest.raises(CorruptError, match=r"cannot be read|not a torch file"):
            open_format("torch").read(io.BytesIO(stream.getvalue()[:position]), weights_only=True, map_location="cpu")


class FailingDisk(io.BytesIO):
    """A file on a disk that gives up."""

    def read(self, size: int | None = -1, /) -> bytes:
        msg = "the disk gave up"
        raise OSError(msg)


def test_failing_disk_is_not_a_corrupt_payload() -> None:
    """The payload may be whole: nothing was read."""
    with pytest.raises(OSError, match="the disk gave up"):
        open_format("safetensors").read(FailingDisk(), weights_only=True, map_location="cpu")


@pytest.mark.parametrize("name", ["torch", "safetensors"])
@pytest.mark.parametrize("data", [b"", b"garbage", b"\x80\x02garbage", b"PK\x03\x04 cut"])
def test_garbage_is_corrupt(name: Literal["torch", "safetensors"], data: bytes) -> None:
    """Whatever a disk gives back, the error is ours."""
    with pytest.raises(CorruptError, match=r"cannot be read|not a torch file"):
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


Pair = namedtuple("Pair", ["left", "right"])


def test_refused_containers_keys_and_attributes_are_named() -> None:
    """What hides in a key, a container's class, a note on a tensor or an OrderedDict's metadata."""
    noted, metadata = torch.ones(1), OrderedDict(w=torch.ones(1))
    noted.note = np.ones(1)  # type: ignore[attr-defined]
    metadata._metadata = {"w": Counter()}  # type: ignore[attr-defined]
    state = {
        "pair": Pair(torch.ones(1), 2),
        "inner": Pair(np.float32(1), 2),
        "by_name": defaultdict(list, a=[1]),
        "ids": {np.int64(3): 1},
        "noted": noted,
        "model": metadata,
    }
    expected = {
        "state['pair']": "test_formats.Pair",
        "state['inner'][0]": "numpy.float32",
        "state['by_name']": "collections.defaultdict",
        f"state['ids'] (key {np.int64(3)!r})": "numpy.int64",
        "state['noted'].note": "numpy.ndarray",
        "state['model']._metadata['w']": "test_formats.Counter",
    }
    assert expected == dict(open_format("torch").refused(state))


def test_refused_agrees_with_the_reader_about_allowed_classes() -> None:
    """An allowed class is not refused any more, but newer versions of torch fill no defaultdict even then."""
    torch_format = open_format("torch")
    many = [Counter(n) for n in range(3)]
    assert [f"state[{n}]" for n in range(3)] == list(torch_format.refused(many))
    with torch.serialization.safe_globals([Counter, defaultdict, list]):
        assert {} == dict(torch_format.refused(many))
        assert many == round_trip("torch", many)
        filled = {"d": defaultdict(list, a=[1])}
        if not torch_format.refused(filled):
            assert filled == round_trip("torch", filled)
            return
        assert ["state['d']"] == list(torch_format.refused(filled))
        with pytest.raises(UnsafePayloadError, match="Can only SETITEM"):
            round_trip("torch", filled)


def test_looking_for_refused_values_copies_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even those in a container class of the user's own; and of many alike values only one is pickled."""
    saved = []
    save = torch.save

    def counted_save(value: Any, stream: Any, **options: Any) -> None:
        save(value, stream, **options)
        saved.append(len(stream.getvalue()))

    monkeypatch.setattr(torch, "save", counted_save)
    state = {
        "own": defaultdict(list, w=[torch.ones(100_000)]),
        "array": np.ones(100_000),
        "history": [np.float64(n) for n in range(1000)],
        "counters": [Counter(n) for n in range(1000)],
    }
    assert 2002 == len(open_format("torch").refused(state))
    assert 4 == len(saved)
    assert max(saved) < 10_000


def test_safetensors_says_what_it_cannot_hold() -> None:
    """The key, its type, and where to go."""
    with pytest.raises(SaveError, match=r"state\['optimizer'\] is a dict; .*weights=model.state_dict"):
        round_trip("safetensors", {"optimizer": {}})
    with pytest.raises(SaveError, match="the state is a list"):
        round_trip("safetensors", [])
    with pytest.raises(SaveError, match=r"torch.complex128.*use format='torch'"):
        round_trip("safetensors", {"c": torch.zeros(1, dtype=torch.complex128)})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_safetensors_refuses_what_its_file_would_lose() -> None:
    """A reserved name, a key that is not text, and tensors without values."""
    with pytest.raises(SaveError, match=r"'__metadata__' is reserved in safetensors"):
        round_trip("safetensors", {"__metadata__": torch.ones(1)})
    with pytest.raises(SaveError, match=r"the key 3 is a int; safetensors holds only"):
        round_trip("safetensors", {3: torch.ones(1)})
    with pytest.raises(SaveError, match=r"state\['m'\] is on the meta device"):
        round_trip("safetensors", {"m": torch.ones(1, device="meta")})
    with pytest.raises(SaveError, match=r"state\['n'\] is torch.float32, nested; .*use format='torch'"):
        round_trip("safetensors", {"n": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])})


def test_safetensors_aligns_every_tensor() -> None:
    """Three bytes of flags do not push the doubles after them off their boundary."""
    chunks = Chunks()
    state = {"flags": torch.tensor([True, False, True]), "wide": torch.ones(2, dtype=torch.float64)}
    open_format("safetensors").write(state, chunks)
    data = chunks.data.getvalue()
    assert 0 == data.index(state["wide"].numpy().tobytes()) % 8
    assert all(same(state[key], found) for key, found in safetensors.torch.load(data).items())


def test_safetensors_writes_tied_and_negated_tensors_by_value() -> None:
    """Two names of one tensor are two entries; a lazily negated view is written as what it reads as."""
    weight = torch.randn(4, 3)
    negated = torch.randn(3, dtype=torch.complex64).conj().imag
    found = round_trip("safetensors", {"in": weight, "out": weight, "view": weight[1:3], "negated": negated})
    assert same(weight, found["in"])
    assert same(weight, found["out"])
    assert same(weight[1:3], found["view"])
    assert same(negated.resolve_neg(), found["negated"])


def test_safetensors_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message is the command to run."""
    monkeypatch.delitem(sys.modules, "checkpointer.formats.safetensors_file", raising=False)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install 'torch-checkpointer\[safetensors\]'"):
        open_format("safetensors")


def test_importing_formats_imports_no_format() -> None:
    """Neither torch nor safetensors, until one is opened."""
    code = "import sys, checkpointer.formats; print({'torch', 'safetensors'} & set(sys.modules))"
    assert "set()\n" == subprocess.check_output([sys.executable, "-c", code], text=True)


def test_own_format_is_taken_as_it_is() -> None:
    """A Format of the user is passed as it is."""
    own = open_format("torch")
    assert own is open_format(own)


def test_unknown_format_lists_the_known() -> None:
    """A typo is an error at construction."""
    with pytest.raises(PolicyError, match=r"'pickle' is not known \(known: torch, safetensors, dcp\)"):
        open_format("pickle")


@pytest.mark.parametrize("twice", ["w", "__metadata__"])
def test_a_safetensors_header_that_has_a_key_twice_is_refused(twice: str, tmp_path: Path) -> None:
    """One reader would take the first tensor, another one the last: neither is read, shown or mapped."""
    entry = '{"dtype": "F32", "shape": [1], "data_offsets": [%d, %d]}'
    second = '{"a": "b"}' if twice == "__metadata__" else entry % (4, 8)
    header = f'{{"w": {entry % (0, 4)}, "__metadata__": {{"a": "c"}}, "{twice}": {second}}}'.encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    payload = open_format("safetensors")
    message = f"the key '{twice}' stands there twice"
    with pytest.raises(CorruptError, match=message), open(path, "rb") as stream:
        payload.read(stream, weights_only=True, map_location="cpu")
    with pytest.raises(CorruptError, match=message):
        payload.read_mapped(str(path), weights_only=True, map_location="cpu")  # type: ignore[attr-defined]
    with pytest.raises(CorruptError, match=message), open_contents(LocalStorage(tmp_path, ""), path.name):
        pass
