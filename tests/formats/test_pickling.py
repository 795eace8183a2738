"""Whatever a state holds, it is restored equal, or the save says which part of it will not be."""

from __future__ import annotations

import enum
import fractions
import io
import re
import subprocess
import sys
import threading
import warnings
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.described import Described

from checkpointer import CheckpointerWarning, CheckpointManager, EverySteps, KeepLast, Policy
from checkpointer.errors import SaveError
from checkpointer.formats import open_format
from checkpointer.formats.dcp_folder import DcpFormat
from checkpointer.formats.tensor_storage import check_stored
from checkpointer.save.background import Busy

pytestmark = pytest.mark.filterwarnings(
    "ignore:TypedStorage", "ignore:.*[Ss]parse", "ignore:.*nested", "ignore:.*quantiz"
)

EACH = Policy(EverySteps(1), [KeepLast(1)])
Pair = namedtuple("Pair", ["left", "right"])


class Color(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


class Name(str):
    pass


class Table(dict[Any, Any]):
    pass


class Subclassed(torch.Tensor):
    pass


@dataclass(frozen=True)
class Settings:
    lr: float = 0.1


def holds_itself(kind: type) -> Any:
    inner: list[Any] = []
    outer = kind([inner]) if kind is not dict else {"inner": inner}
    inner.append(outer)
    return outer


def noted(note: Any) -> torch.Tensor:
    tensor = torch.nn.Parameter(torch.ones(2))
    tensor.note = note  # type: ignore[attr-defined]
    return tensor


ZOO: Mapping[str, Callable[[], Any]] = {
    "bytes": lambda: b"ab\xff",
    "no bytes": lambda: b"",
    "bytearray": lambda: bytearray(b"ab"),
    "half a character": lambda: "\ud800x",
    "complex": lambda: 1 + 2j,
    "nan": lambda: float("nan"),
    "set": lambda: {1, (2, 3)},
    "frozenset": lambda: frozenset({1}),
    "range": lambda: range(3),
    "slice": lambda: slice(1),
    "ellipsis": lambda: ...,
    "class": lambda: int,
    "function": lambda: len,
    "lambda": lambda: lambda: 1,
    "lock": threading.Lock,
    "generator": lambda: (_ for _ in ()),
    "numpy scalar": lambda: np.float64(1),
    "numpy array": lambda: np.arange(3),
    "numpy flag": lambda: np.bool_(True),
    "numpy dtype": lambda: np.dtype("f4"),
    "size": lambda: torch.Size([1, 2]),
    "dtype": lambda: torch.bfloat16,
    "device": lambda: torch.device("cuda:1"),
    "layout": lambda: torch.sparse_coo,
    "memory format": lambda: torch.channels_last,
    "random generator": torch.Generator,
    "ordered": lambda: OrderedDict(a=1),
    "counter": lambda: Counter("aab"),
    "defaultdict": lambda: defaultdict(list, a=[1]),
    "no defaults": lambda: defaultdict(None),
    "deque": lambda: deque([1]),
    "namedtuple": lambda: Pair(1, 2),
    "enum": lambda: Color.RED,
    "int enum": lambda: Level.LOW,
    "text of a class": lambda: Name("a"),
    "dict of a class": lambda: Table(a=1),
    "path": lambda: Path("a"),
    "frozen dataclass": Settings,
    "fraction": lambda: fractions.Fraction(1, 2),
    "list in itself": lambda: holds_itself(list),
    "dict in itself": lambda: holds_itself(dict),
    "tuple in itself": lambda: holds_itself(tuple),
    "deep": lambda: [[[[[[[[[1]]]]]]]]],
    "tensor": lambda: torch.ones(2),
    "view": lambda: torch.ones(4)[1::2],
    "parameter": lambda: torch.nn.Parameter(torch.ones(2)),
    "noted": lambda: noted({"a": (1, 2)}),
    "noted with what is refused": lambda: noted([2**3000]),
    "uninitialized": torch.nn.UninitializedParameter,
    "buffer": lambda: torch.nn.Buffer(torch.ones(2)),
    "meta": lambda: torch.empty(2, device="meta"),
    "bfloat16": lambda: torch.ones(2, dtype=torch.bfloat16),
    "float8": lambda: torch.ones(2).to(torch.float8_e4m3fn),
    "uint64": lambda: torch.tensor([2**63], dtype=torch.uint64),
    "uint1": lambda: torch.empty(2, dtype=getattr(torch, "uint1")),  # noqa: B009
    "conjugate": lambda: torch.ones(2, dtype=torch.complex64).conj(),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse rows": lambda: torch.eye(3).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "quantized by row": lambda: torch.quantize_per_channel(
        torch.ones(2, 3), torch.tensor([0.1, 0.2]), torch.tensor([0, 1]), 0, torch.quint8
    ),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "subclass": lambda: torch.ones(2).as_subclass(Subclassed),
    "opaque": lambda: torch.ones(2).to_mkldnn(),
    "named results": lambda: torch.max(torch.ones(2, 2), 0),
    "module": lambda: torch.nn.Linear(1, 1),
}

LEAVES = st.one_of(
    st.sampled_from(sorted(ZOO)).map(lambda name: ZOO[name]()),
    st.integers(),
    st.integers(2035, 2050).flatmap(lambda bits: st.sampled_from([2**bits, 2**bits - 1, -(2**bits)])),
    st.text(max_size=3),
    st.none(),
    st.booleans(),
    st.floats(),
)
KEYS = st.one_of(st.text(max_size=2), st.integers(0, 9), st.sampled_from([None, 1.5, b"", b"k", (1, 2), Color.RED]))
STATES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=3),
        st.dictionaries(KEYS, inner, max_size=2).map(OrderedDict),
        st.lists(inner, min_size=2, max_size=2).map(lambda items: Pair(*items)),
    ),
    max_leaves=6,
)


def comes_back(state: Any) -> bool:
    """Return whether plain torch saves a state, and loads it safely as it was."""
    stream = io.BytesIO()
    try:
        torch.save(state, stream)
        stream.seek(0)
        loaded = torch.load(stream, weights_only=True)
    except Exception:
        return False
    return bool(Described(state).parts == Described(loaded).parts)


def save(state: Any, *, background: Busy | None) -> tuple[str, Any]:
    """Save a state and restore it; return what was said of it, and if nothing was, what came back."""
    manager = CheckpointManager(None, EACH, state=lambda: state, background=background)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CheckpointerWarning)
        try:
            manager.observe({}, 1, 0)
            manager.wait()
        except SaveError as error:
            return str(error), None
        finally:
            manager.close()
    said = " ".join(str(warning.message) for warning in caught if warning.category is CheckpointerWarning)
    if said:
        return said, None
    restored = CheckpointManager(manager._directory.storage).restore()
    assert restored is not None
    return "", restored.state


@pytest.mark.parametrize("background", [None, "wait"])
@settings(max_examples=100)
@given(part=STATES)
def test_a_state_comes_back_equal_or_the_save_names_what_will_not(background: Busy | None, part: Any) -> None:
    """In the loop and in the background: what a safe load accepts is accepted without a warning."""
    state = {"part": part}
    said, restored = save(state, background=background)
    if comes_back(state):
        assert "" == said
        assert Described(state).parts == Described(restored).parts
    else:
        assert re.search(r"state\['part'\]", said)


@pytest.mark.parametrize("background", [None, "wait"])
@pytest.mark.parametrize("name", sorted(ZOO))
def test_each_kind_of_value_comes_back_equal_or_is_named(background: Busy | None, name: str) -> None:
    """Alone, so that none is left to chance."""
    state = {"a": [ZOO[name]()]}
    said, _ = save(state, background=background)
    assert comes_back(state) != ("state['a'][0]" in said)


@pytest.mark.parametrize("number", [2**2039, -(2**2039) - 1, 10**700])
def test_an_integer_that_a_safe_load_cannot_read_is_named(number: int) -> None:
    """The smallest of them, on both sides of zero; the one before is restored."""
    with pytest.warns(CheckpointerWarning, match=r"state\['n'\] is a builtins.int of 2040 bits or more, which a safe"):
        CheckpointManager(None, EACH, state=lambda: {"n": number}).observe({}, 1, 0)
    fine = {"n": number - 1 if number == 2**2039 else -(2**2039)}
    assert ("", fine) == save(fine, background=None)


def test_many_refused_values_of_one_class_are_one_warning() -> None:
    """It has their number, and says where a few of them are."""
    state = {"losses": [np.float64(n) for n in range(300)], "path": Path("a")}
    said, _ = save(state, background=None)
    assert 2 == said.count("which a safe load refuses")
    assert "state['losses'][0], state['losses'][1], state['losses'][2] and 297 more are numpy.float64" in said
    assert re.search(r"state\['path'\] is a pathlib", said)


@pytest.mark.filterwarnings("ignore:.*a safe load refuses")
@pytest.mark.parametrize("background", [None, "wait"])
def test_what_cannot_be_pickled_is_named(background: Busy | None) -> None:
    """Also if it is an attribute of an object within the state."""
    note = noted({"deep": [1, threading.Lock()]})
    with CheckpointManager(None, EACH, state=lambda: {"w": note}, background=background) as manager:
        what = r"state\['w'\]\.note\['deep'\]\[1\] is a _thread.lock .*cannot pickle.*leave it out of the state"
        with pytest.raises(SaveError, match=what):
            manager.observe({}, 1, 0)


class Once:
    """Can be pickled, and not put together again."""

    def __reduce__(self) -> Any:
        return Once, (1,)


def test_what_cannot_be_put_together_again_is_named() -> None:
    """A save in the loop does not try it, and warns."""
    manager = CheckpointManager(None, EACH, state=lambda: {"a": [Once()]}, background="wait")
    with pytest.raises(SaveError, match=r"state\['a'\]\[0\] is a .*Once .*or pass background=None"):
        manager.observe({}, 1, 0)
    manager.close()


# Tensors that stand for a file


class Mapped(torch.Tensor):
    """A tensor on the pages of a file, which pickles the file's path."""

    path: str

    @classmethod
    def of(cls, path: str, size: int) -> Mapped:
        tensor = torch.from_file(path, shared=True, size=size).as_subclass(cls)
        tensor.path = path
        return tensor

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Mapped.of, (self.path, self.numel())


@pytest.fixture
def mapped(tmp_path: Path) -> torch.Tensor:
    (tmp_path / "file").write_bytes(np.ones(3, "f4").tobytes())
    return Mapped.of(str(tmp_path / "file"), 3)


def check_copied(tensor: torch.Tensor, state: Any, find: Callable[[Any], Any]) -> None:
    """Check that what is written to a tensor of ones once it is saved does not show in what is restored."""
    for background in (None, "wait"):
        tensor.fill_(1)
        manager = CheckpointManager(None, EACH, state=lambda: state, background=background)
        manager.observe({}, 1, 0)
        tensor.fill_(5)
        restored = manager.restore()
        assert restored is not None
        assert [1.0] * tensor.numel() == find(restored.state).tolist()
        manager.close()


def test_a_memory_mapped_tensor_is_saved_with_its_bytes(mapped: torch.Tensor) -> None:
    """Not with the path of its file, where the training goes on writing; a safe load takes it."""
    check_copied(mapped, {"w": [mapped]}, lambda state: state["w"][0])


def test_a_memory_mapped_tensor_is_saved_with_its_bytes_in_a_folder_too(tmp_path: Path, mapped: torch.Tensor) -> None:
    """The DCP format writes each tensor by itself."""
    DcpFormat().write_folder({"w": mapped}, str(tmp_path / "x.dcp"))
    mapped.fill_(5)
    found = DcpFormat().read_folder(str(tmp_path / "x.dcp"), weights_only=True, map_location="cpu")
    assert [1.0, 1.0, 1.0] == found["w"].tolist()


@pytest.mark.parametrize("where", ["folder", None])
def test_a_memory_mapped_tensordict_is_saved_with_its_bytes(tmp_path: Path, where: str | None) -> None:
    """On files of its own, and on those that tensordict removes by itself."""
    tensordict = pytest.importorskip("tensordict")
    table = tensordict.TensorDict({"a": torch.ones(3)}, []).memmap(tmp_path / where if where else None)
    check_copied(table["a"], {"w": table.to_dict()}, lambda state: state["w"]["a"])


def test_tensors_on_a_file_by_other_means_are_saved_with_their_bytes(tmp_path: Path) -> None:
    """Those of torch.from_file, of a mapped array and in shared memory are plain tensors."""
    (tmp_path / "file").write_bytes(np.ones(3, "f4").tobytes())
    from_file = torch.from_file(str(tmp_path / "file"), shared=True, size=3)
    from_array = torch.from_numpy(np.memmap(tmp_path / "file", dtype="f4", mode="r+"))
    shared: Any = torch.ones(3)
    for tensor in (from_file, from_array, shared.share_memory_()):
        check_copied(tensor, {"w": tensor}, lambda state: state["w"])


# Tensors without memory of their own


def test_a_tensor_without_memory_of_its_own_is_refused_by_safetensors() -> None:
    """Reading its address would end the process."""
    code = """
import torch
from torch.testing._internal.two_tensor import TwoTensor
from checkpointer.errors import SaveError
from checkpointer.formats import open_format
try:
    open_format("safetensors").write({"w": TwoTensor(torch.ones(2), torch.ones(2))}, open("/dev/null", "wb"))
except SaveError as error:
    print(error)
"""
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert re.search(r"state\['w'\] is a .*TwoTensor, which has no memory of its own", said)


# Tensors whose storage is too small


def freed(size: int) -> torch.Tensor:
    """Return a tensor of 400 bytes on a storage that has ``size``."""
    tensor = torch.ones(100)
    tensor.untyped_storage().resize_(size)
    return tensor


@pytest.mark.parametrize("background", [None, "wait"])
@pytest.mark.parametrize("format", ["torch", "safetensors", "dcp"])
@pytest.mark.parametrize("size", [0, 8])
def test_a_freed_storage_is_refused_by_name(tmp_path: Path, size: int, format: Any, background: Busy | None) -> None:
    """Its checkpoint could not be loaded, or would have the bytes of other memory."""
    state = {"w": torch.ones(2), "x": freed(size)}
    with CheckpointManager(tmp_path, EACH, state=lambda: state, format=format, background=background) as manager:
        with pytest.raises(SaveError, match=rf"state\['x'\].* needs 400 bytes of a storage that has {size}: "):
            manager.observe({}, step=1, epoch=0)
        assert () == manager.records
        assert [".checkpointer"] == [path.name for path in tmp_path.iterdir()]


def test_views_and_tensors_without_bytes_need_no_more_than_their_storage_has() -> None:
    """A negative answer for one of them would refuse a good state."""
    base = torch.ones(4, 6)
    state = [base.t(), base[1:, 2:], base[:0], base.expand(3, 4, 6), torch.empty(0), torch.empty(3, device="meta")]
    open_format("torch").write([*state, base.to_sparse()], io.BytesIO())
    for tensor in [*state, torch._efficientzerotensor((2,)), torch.nn.UninitializedParameter()]:
        check_stored(tensor)
    with pytest.raises(SaveError, match="needs 400 bytes"):
        check_stored(freed(8).as_subclass(Subclassed))
