"""Snapshots: what comes out of the copy is what `torch.save` would have written at that moment, to the last stride."""

from __future__ import annotations

import collections
import gc
import io
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from support.described import Described
from support.gated import GatedStorage

from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy
from checkpointer.errors import SaveError
from checkpointer.formats.snapshot import Snapshots

EACH = Policy(EverySteps(1), [KeepLast(1)])


def saved(state: Any) -> Any:
    """Return what a blocking save would have kept of a state."""
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


class Subclassed(torch.Tensor):
    """A tensor of the user's own."""


class Plain:
    """An object that is not a container."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.history = [1, 2]


pytestmark = pytest.mark.filterwarnings(
    "ignore:TypedStorage", "ignore:.*[Ss]parse", "ignore:.*nested", "ignore:.*quantiz", "ignore:.*a safe load refuses"
)


def kinds() -> dict[str, Any]:
    """Return one of everything a state may hold."""
    weight = torch.nn.Parameter(torch.randn(3, 4))
    weight.note = ["mine"]  # type: ignore[attr-defined]
    ordered = collections.OrderedDict(a=torch.ones(1))
    ordered._metadata = {"version": 1}  # type: ignore[attr-defined]
    return {
        "tied": [weight, weight, weight.detach(), weight.detach().view(-1)],
        "views": [weight.detach()[1], weight.detach().t(), weight.detach()[:, ::2]],
        "no leaf": weight * 2,
        "expanded": torch.randn(1, 3).expand(1000, 3),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "negative": torch.randn(3, dtype=torch.complex64).conj().imag,
        "bool": torch.tensor([True, False]),
        "float8": torch.randn(3).to(torch.float8_e4m3fn),
        "bfloat16": torch.randn(3, dtype=torch.bfloat16),
        "uint16": torch.tensor([1, 65535], dtype=torch.uint16),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3.5),
        "sparse": torch.eye(3).to_sparse(),
        "not coalesced": torch.sparse_coo_tensor(torch.tensor([[0, 0]]), torch.tensor([1.0, 2.0]), (2,)),
        "sparse rows": torch.eye(3).to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(torch.randn(3, 2).t(), 0.1, 3, torch.qint8),
        "meta": torch.empty(3, 2, device="meta").t(),
        "nested": torch.nested.nested_tensor([torch.randn(2), torch.randn(3)], layout=torch.jagged),
        "subclass": torch.randn(2).as_subclass(Subclassed),
        "object": Plain(weight),
        "module": torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)),
        "ordered": ordered,
        "rng": torch.get_rng_state(),
        "numpy": np.arange(6).reshape(2, 3),
        "numpy, in columns": np.arange(6.0).reshape(2, 3).T,
        "numpy, with gaps": np.arange(6)[::2],
        "numpy scalar": np.float64(0.5),
        "text": {"a": ["b", ("c", 1, 2.0, None, b"d")]},
    }


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # What torch says of its prototypes, once.
    NAMES = sorted(kinds())


@pytest.mark.parametrize("name", NAMES)
def test_a_snapshot_of_each_kind_is_what_a_blocking_save_writes(name: str) -> None:
    """Alone, and so that nothing is forgotten in between."""
    state = {name: kinds()[name]}
    snapshot = Snapshots().take(state)
    copy = snapshot.wait()
    if name == "meta":
        assert copy[name].is_meta
        assert (state[name].shape, state[name].stride()) == (copy[name].shape, copy[name].stride())
        return
    assert Described(saved(state)).parts == Described(saved(copy)).parts


def test_a_snapshot_of_everything_together_keeps_what_is_shared() -> None:
    """Ties go across the whole state, not only within one entry."""
    state = kinds()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert Described(saved(state)).parts == Described(saved(Snapshots().take(state).wait())).parts


def test_a_storage_that_many_share_is_copied_once() -> None:
    """A thousand rows of one element take one element."""
    base = torch.randn(100)
    state = [base[start:] for start in range(100)] + [base[:1].expand(1000)]
    copy = Snapshots().take(state).wait()
    assert 1 == len({tensor.untyped_storage().data_ptr() for tensor in copy})
    assert 400 == copy[0].untyped_storage().nbytes()


def test_buffers_are_used_again_and_those_no_longer_needed_are_let_go() -> None:
    """Memory stays at one copy of the state, however the state changes."""
    snapshots = Snapshots()
    first = snapshots.take({"a": torch.zeros(1000), "b": torch.zeros(10)})
    places = {name: tensor.data_ptr() for name, tensor in first.wait().items()}
    first.release()
    first.release()
    again = snapshots.take({"a": torch.ones(1000), "b": torch.ones(10)})
    assert places == {name: tensor.data_ptr() for name, tensor in again.wait().items()}
    assert bool((again.wait()["a"] == 1).all())
    again.release()
    other = snapshots.take({"c": torch.ones(7), "b": torch.ones(2, 5)})
    copies = other.wait()
    assert places["b"] == copies["b"].data_ptr()
    released = weakref.ref(copies["c"])
    del copies
    other.release()
    snapshots.take({"b": torch.ones(10)})
    gc.collect()
    assert released() is None


def test_two_snapshots_at_a_time_do_not_share_memory() -> None:
    """One is being written while the other waits for its turn."""
    snapshots = Snapshots(copies=2)
    state = {"a": torch.zeros(10)}
    first = snapshots.take(state)
    state["a"].fill_(1)
    second = snapshots.take(state)
    assert (0.0, 1.0) == (first.wait()["a"].max(), second.wait()["a"].min())
    places = {first.wait()["a"].data_ptr(), second.wait()["a"].data_ptr()}
    first.release()
    second.release()
    again = [snapshots.take(state), snapshots.take(state)]
    assert places == {snapshot.wait()["a"].data_ptr() for snapshot in again}


def test_a_failed_snapshot_gives_its_buffers_back() -> None:
    """And says which state it was that cannot be copied."""
    snapshots = Snapshots()
    state: dict[str, Any] = {"a": torch.zeros(10)}
    first = snapshots.take(state)
    place = first.wait()["a"].data_ptr()
    first.release()
    with pytest.raises(SaveError, match=r"cannot be copied.*lock"):
        snapshots.take({"a": torch.zeros(10), "lock": threading.Lock()})
    assert place == snapshots.take(state).wait()["a"].data_ptr()


def test_sparse_copies_are_not_kept_by_torch() -> None:
    """It notes what a load has rebuilt, and would hold on to the buffers."""
    taken = Snapshots().take({"s": torch.eye(3).to_sparse()})
    copy = weakref.ref(taken.wait()["s"])
    taken.release()
    del taken
    gc.collect()
    assert copy() is None


def test_sharded_tensors_survive() -> None:
    """A DTensor has its mesh and placements, and the copy of its shard."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
        try:
            mesh = init_device_mesh("cpu", (1,))
            sharded = distribute_tensor(torch.arange(6.0), mesh, [Shard(0)])
            copy = Snapshots().take({"w": sharded}).wait()["w"]
            sharded.to_local().zero_()
            assert isinstance(copy, DTensor)
            assert (sharded.device_mesh, sharded.placements) == (copy.device_mesh, copy.placements)
            assert [0.0, 1.0, 2.0, 3.0, 4.0, 5.0] == copy.to_local().tolist()
        finally:
            dist.destroy_process_group()


# The moment observe returns


def _view(tensor: torch.Tensor, kind: int, start: int) -> torch.Tensor:
    flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.clone().reshape(-1)
    match kind:
        case 0:
            return tensor
        case 1:
            return flat[min(start, flat.numel()) :]
        case 2:
            return flat[::2]
        case 3:
            return flat[:1].expand(start + 1, 1) if flat.numel() else flat
        case 4:
            return torch.nn.Parameter(tensor.detach()) if tensor.is_floating_point() else tensor
        case _:
            return flat.view(-1, 1).t()


DTYPES = st.sampled_from([torch.float32, torch.float64, torch.int64, torch.uint8, torch.bfloat16])
BASES = st.lists(st.tuples(DTYPES, st.integers(0, 9)), min_size=1, max_size=3)
LEAVES = st.one_of(
    st.tuples(st.just("view"), st.integers(0, 2), st.integers(0, 5), st.integers(0, 3)),
    st.tuples(st.just("array"), st.integers(0, 4)),
    st.tuples(st.just("plain"), st.one_of(st.integers(), st.text(max_size=3), st.none())),
    st.tuples(st.just("again"), st.integers(0, 5)),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.tuples(st.just("list"), st.lists(inner, max_size=3)),
        st.tuples(st.just("dict"), st.dictionaries(st.text(max_size=2), inner, max_size=3)),
    ),
    max_leaves=8,
)


class Grown:
    """A state grown from a description, and everything in it that can be changed."""

    def __init__(self, bases: list[tuple[torch.dtype, int]], tree: Any) -> None:
        self.bases = [torch.arange(1, size + 1).to(dtype) for dtype, size in bases]
        self.changes: list[Callable[[], object]] = [self._zero(base) for base in self.bases]
        self._made: list[Any] = [self.bases[0]]
        self.state = {"state": self._grow(tree)}

    def _zero(self, base: torch.Tensor) -> Callable[[], object]:
        return lambda: base.zero_()

    def _grow(self, tree: Any) -> Any:
        made = self._make(*tree)
        self._made.append(made)
        return made

    def _make(self, kind: str, *rest: Any) -> Any:
        match kind:
            case "view":
                return _view(self.bases[rest[0] % len(self.bases)], rest[1], rest[2])
            case "array":
                array = np.arange(1, rest[0] + 1)
                self.changes.append(lambda: array.fill(0))
                return array
            case "plain":
                return rest[0]
            case "again":
                return self._made[rest[0] % len(self._made)]
            case "list":
                items = [self._grow(item) for item in rest[0]]
                self.changes.append(items.clear)
                return items
            case _:
                table = {key: self._grow(item) for key, item in rest[0].items()}
                self.changes.append(table.clear)
                return table


@settings(max_examples=120, deadline=None)
@given(grown=st.lists(st.builds(Grown, BASES, TREES), min_size=2, max_size=2))
def test_changing_the_model_the_moment_observe_returns_changes_nothing_that_is_written(grown: list[Grown]) -> None:
    """Values, structure, sharing and strides are those of the moment; also where buffers are used a second time."""
    storage = GatedStorage()
    state: Any = None
    manager = CheckpointManager(storage, EACH, state=lambda: state, background="wait")
    for step, each in enumerate(grown, start=1):
        state = each.state
        expected = Described(saved(state)).parts
        storage.shut()
        manager.observe({}, step=step, epoch=0, epoch_end=False)
        for change in each.changes:
            change()
        state = None
        storage.open_gate()
        manager.wait()
        restored = torch.load(storage.open(f"epoch=0-step={step}.ckpt"), weights_only=False)
        assert expected == Described(restored).parts
    manager.close()


@pytest.mark.cuda
def test_on_cuda_what_the_stream_does_next_comes_after_the_copy() -> None:
    """The copy runs beside the host, and before the next kernel; its buffers are pinned."""
    snapshots = Snapshots()
    weight = torch.ones(1 << 24, device="cuda")
    snapshot = snapshots.take({"w": weight, "tied": weight[:5]})
    weight.zero_()
    state = snapshot.wait()
    assert state["w"].device.type == "cpu"
    assert state["w"].is_pinned()
    assert bool((state["w"] == 1).all())
    assert state["tied"].data_ptr() == state["w"].data_ptr()
    snapshot.release()


class Trimmed:
    """Cuts its tensor when it is unpickled."""

    def __init__(self) -> None:
        self.tensor = torch.arange(4.0)

    def __setstate__(self, state: dict[str, torch.Tensor]) -> None:
        self.__dict__ = state
        self.tensor.resize_(2)


def test_tensors_that_an_object_changed_in_a_copy_are_not_used_again() -> None:
    """Loading a copy runs the code of its classes: the next copy has the values of then, on tensors of its own."""
    snapshots, trimmed = Snapshots(), Trimmed()
    view = trimmed.tensor.view(2, 2)
    for value in (1.0, 2.0, 3.0):
        trimmed.tensor.fill_(value)
        snapshot = snapshots.take({"trimmed": trimmed, "view": view})
        assert [[value, value], [value, value]] == snapshot.wait()["view"].tolist()
        assert [value, value] == snapshot.state["trimmed"].tensor.tolist()
        snapshot.release()


@pytest.mark.parametrize("size", [0, 8])
def test_a_tensor_whose_storage_was_freed_or_cut_is_refused(size: int) -> None:
    """A buffer would be made larger for it, with whatever the memory holds."""
    tensor = torch.full((100,), 7.0)
    snapshots = Snapshots()
    snapshots.take({"w": tensor}).release()
    tensor.untyped_storage().resize_(size)
    with pytest.raises(SaveError, match=f"needs 400 bytes of a storage that has {size}: the storage was freed or cut"):
        snapshots.take({"w": tensor})
