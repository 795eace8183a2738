"""Snapshots that use the tensors of the snapshot before, and snapshots of a part of a storage."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.described import Described

from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy
from checkpointer.errors import SaveError
from checkpointer.formats.snapshot import Snapshots
from checkpointer.formats.tensor_copies import UNUSED, compared_by_torch, compared_in_python
from checkpointer.formats.torch_file import TorchFormat

MB = 1 << 20
State = dict[str, Any]


def saved(state: Any) -> Any:
    """Return what a blocking save would have kept of a state."""
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


class Named(torch.Tensor):
    """A tensor of the user's own."""


def state_of() -> State:
    """Return a state of plain tensors, some of which share memory."""
    weight = torch.nn.Parameter(torch.randn(4, 6))
    flat = torch.randn(40)
    return {
        "weight": weight,
        "tied": weight.detach(),
        "halves": [flat[:20], flat[20:]],
        "step": torch.tensor(1.0),
        "ids": torch.arange(6),
        "half": torch.randn(3).half(),
        "complex": torch.randn(2, 2, dtype=torch.complex64),
        "empty": torch.empty(0, 3),
        "flag": torch.tensor([True, False, True]),
        "bytes": torch.arange(5, dtype=torch.uint8),
    }


def _set(state: State, name: str, value: Any) -> None:
    state[name] = value


def _negate(state: State, name: str) -> None:
    if state[name].is_quantized:  # torch cannot save what that makes, and ends the process.
        raise TypeError
    state[name] = torch._neg_view(state[name])


CHANGES: dict[str, Callable[[State], object]] = {
    "nothing": lambda state: None,
    "values": lambda state: [part.add_(1) for part in (state["weight"].data, state["step"], state["halves"][1])],
    "replaced by an equal one": lambda state: _set(state, "ids", state["ids"] + 1),
    "another dtype": lambda state: _set(state, "ids", state["ids"].int()),
    "another dtype of that size": lambda state: _set(state, "ids", state["ids"].double()),
    "another shape": lambda state: _set(state, "ids", state["ids"].view(2, 3)),
    "other strides": lambda state: _set(state, "complex", state["complex"].t()),
    "another offset": lambda state: _set(state, "halves", [state["halves"][1], state["halves"][1]]),
    "grown in place": lambda state: state["ids"].resize_(9).fill_(7),
    "storage grown in place": lambda state: state["ids"].untyped_storage().resize_(80),
    "no gradient": lambda state: state["weight"].requires_grad_(False),
    "a gradient": lambda state: state["step"].requires_grad_(),
    "no leaf": lambda state: _set(state, "step", state["step"].clone().requires_grad_() * 2),
    "no parameter": lambda state: _set(state, "weight", state["weight"].detach().requires_grad_()),
    "untied": lambda state: _set(state, "tied", state["tied"].clone()),
    "untied in place": lambda state: setattr(state["weight"], "data", torch.randn(4, 6)),
    "tied": lambda state: _set(state, "ids", state["weight"].detach().view(-1)[:6]),
    "the same object twice": lambda state: _set(state, "tied", state["weight"]),
    "halves swapped": lambda state: state["halves"].reverse(),
    "conjugate": lambda state: _set(state, "complex", state["complex"].conj()),
    "negative": lambda state: _negate(state, "half"),
    "a note": lambda state: setattr(state["weight"], "note", "mine"),
    "subclass": lambda state: _set(state, "ids", state["ids"].as_subclass(Named)),
    "sparse": lambda state: _set(state, "flag", state["flag"].to_sparse()),
    "quantized": lambda state: _set(state, "half", torch.quantize_per_tensor(torch.randn(3), 0.1, 3, torch.qint8)),
    "a storage": lambda state: _set(state, "flag", state["bytes"].untyped_storage()),
    "one more": lambda state: _set(state, f"more {len(state)}", torch.randn(len(state))),
    "one less": lambda state: state.pop("step", None),
    "another order": lambda state: _set(state, "weight", state.pop("weight")),
}


@pytest.mark.filterwarnings("ignore:.*quantiz", "ignore:.*[Ss]parse", "ignore:TypedStorage")
@settings(max_examples=60)
@given(st.lists(st.sampled_from(sorted(CHANGES)), max_size=4))
def test_after_each_change_of_the_state_a_snapshot_is_what_a_blocking_save_writes(changes: list[str]) -> None:
    """Whether the tensors of the snapshot before are used again or not."""
    snapshots, state = Snapshots(), state_of()
    for change in ["nothing", *changes, "values"]:
        try:
            CHANGES[change](state)
        except (KeyError, RuntimeError, TypeError, AttributeError):  # It does not go with an earlier one.
            continue
        try:
            TorchFormat().write(state, io.BytesIO())
        except SaveError:  # A storage has fewer bytes than its tensor by now.
            with pytest.raises(SaveError, match="was freed or cut"):
                snapshots.take(state)
            return
        snapshot = snapshots.take(state)
        assert Described(saved(state)).parts == Described(saved(snapshot.wait())).parts
        snapshot.release()


def _metadata() -> dict[str, torch.Tensor]:
    """Return tensors of which no two have the same metadata."""
    base = torch.randn(4, 4)
    return {
        "base": base,
        "shape": torch.randn(2, 8),
        "dimensions": torch.randn(16),
        "strides": base.t(),
        "expanded": torch.randn(4, 1).expand(4, 4),
        "dtype": base.double(),
        "dtype of that size": base.int(),
        "gradient": torch.randn(4, 4, requires_grad=True),
        "parameter": torch.nn.Parameter(base),
        "fixed parameter": torch.nn.Parameter(base, requires_grad=False),
        "complex": torch.randn(4, 4, dtype=torch.complex64),
        "scalar": torch.tensor(1.0),
        "empty": torch.empty(0),
    }


ODD: dict[str, Callable[[], Any]] = {
    "conjugate": lambda: torch.randn(4, 4, dtype=torch.complex64).conj(),
    "negative": lambda: torch._neg_view(torch.randn(4, 4)),
    "meta": lambda: torch.empty(4, 4, device="meta"),
    "sparse": lambda: torch.randn(4, 4).to_sparse(),
    "subclass": lambda: torch.randn(4, 4).as_subclass(Named),
    "zero": lambda: torch._efficientzerotensor((4, 4)),
}


@pytest.mark.parametrize("compared", [compared_by_torch, compared_in_python])
def test_tensors_are_used_again_only_for_tensors_of_the_same_metadata(compared: Any) -> None:
    """If this fails for torch's comparison, torch has changed: it must be offered, and see each difference."""
    tensors = _metadata()
    odd = [make() for make in ODD.values()]
    for name, tensor in tensors.items():
        holds_for = compared([tensor])
        same = tensor.detach().clone(memory_format=torch.preserve_format)
        if type(tensor) is torch.Tensor and name != "expanded":
            assert holds_for([same.requires_grad_(tensor.requires_grad)])
        assert [name] == [other for other in tensors if holds_for([tensors[other]])]
        assert not any(holds_for([other]) for other in odd)


def test_the_second_snapshot_of_a_state_is_in_the_tensors_of_the_first() -> None:
    """Nothing is made anew, even for state dicts that are made anew."""
    snapshots, model = Snapshots(), torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    first = snapshots.take(model.state_dict())
    copies = list(first.wait().values())
    first.release()
    second = snapshots.take(model.state_dict())
    assert all(before is now for before, now in zip(copies, second.wait().values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64])
def test_each_byte_of_a_tensor_is_copied(dtype: torch.dtype) -> None:
    """Also bytes that its dtype does not use, such as those of a bool that are neither 0 nor 1."""
    snapshots, whole = Snapshots(), torch.arange(256, dtype=torch.uint8)
    for _ in range(2):
        snapshot = snapshots.take({"w": whole.view(dtype)})
        assert [*range(256)] == snapshot.wait()["w"].untyped_storage().tolist()
        snapshot.release()


def test_a_snapshot_in_inference_mode_does_not_spoil_the_next_one() -> None:
    """Tensors made in that mode could not be changed outside of it."""
    snapshots, weight = Snapshots(), torch.nn.Parameter(torch.zeros(3))
    with torch.inference_mode():
        snapshots.take({"w": weight}).release()
    weight.data.fill_(1)
    assert [1.0] * 3 == snapshots.take({"w": weight}).wait()["w"].tolist()


def test_buffers_are_on_the_host_whatever_the_default_device_is() -> None:
    """A default device is what new tensors of the training are made on."""
    weight = torch.ones(3)
    with torch.device("meta"):
        copy = Snapshots().take({"w": weight, "sparse": weight.to_sparse()}).wait()
    assert [1.0] * 3 == copy["w"].tolist()
    assert [1.0] * 3 == copy["sparse"].to_dense().tolist()


# Parts of storages


def test_of_a_large_storage_the_snapshot_has_what_the_state_uses() -> None:
    """The memory of a copy, and the file, are those of the slices."""
    flat = torch.arange(2 * MB)  # 16 MB
    state = {
        "a": flat[MB : MB + 1000],
        "b": flat[MB + 500 : MB + 2000],
        "column": flat[MB : MB + 900].view(30, 30)[:, 1],
    }
    copy = Snapshots().take(state).wait()
    assert 16_000 == copy["a"].untyped_storage().nbytes()
    assert {copy["a"].untyped_storage().data_ptr()} == {part.untyped_storage().data_ptr() for part in copy.values()}
    assert all(torch.equal(state[name], copy[name]) for name in state)
    assert [part.stride() for part in state.values()] == [part.stride() for part in copy.values()]
    copy["a"][500] = -1
    assert -1 == copy["b"][0]


def test_a_storage_that_is_in_the_state_itself_is_copied_whole() -> None:
    """So is one of which less than the limit is left out, and that of a tensor with attributes."""
    flat = torch.zeros(2 * UNUSED, dtype=torch.uint8)
    noted = torch.zeros(2 * UNUSED, dtype=torch.uint8)[:5]
    noted.note = "mine"  # type: ignore[attr-defined]
    nearly = torch.zeros(2 * UNUSED, dtype=torch.uint8)[: UNUSED + 1]
    copy = Snapshots().take({"slice": flat[:5], "storage": flat.untyped_storage(), "noted": noted, "nearly": nearly})
    sizes = {name: part.untyped_storage().nbytes() for name, part in copy.wait().items() if name != "storage"}
    assert {"slice": 2 * UNUSED, "noted": 2 * UNUSED, "nearly": 2 * UNUSED} == sizes


def test_a_slice_is_written_as_the_slice_in_the_background(tmp_path: Path) -> None:
    """Restored views of one storage share memory again."""
    flat = torch.randn(2 * MB)
    state = {"layers": [flat[5:1005].view(10, 100), flat[500:600], flat[7:7]]}
    policy = Policy(EverySteps(1), [KeepLast(1)])
    with CheckpointManager(str(tmp_path), policy, state=lambda: state, background="wait") as manager:
        manager.observe({}, step=1, epoch=0, epoch_end=False)
        expected = [layer.clone() for layer in state["layers"]]
        flat.zero_()
        manager.wait()
        assert manager.last is not None
        assert MB > manager.last.size
        restored = manager.restore()
    assert restored is not None
    layers = restored.state["layers"]
    assert all(itertools.starmap(torch.equal, zip(expected, layers, strict=True)))
    layers[0].zero_()
    assert not layers[1].any()


VIEWS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 40), st.integers(0, 9), st.integers(1, 3)), max_size=6)
DTYPES = st.sampled_from([torch.uint8, torch.int16, torch.float32, torch.complex128])


@settings(max_examples=60)
@given(VIEWS, VIEWS, DTYPES)
def test_slices_have_the_values_strides_and_shared_memory_of_the_state(
    early: list[tuple[int, int, int, int]], late: list[tuple[int, int, int, int]], dtype: torch.dtype
) -> None:
    """Also those at both ends of a storage, between which much is unused, and in a second snapshot."""
    bases = [torch.arange(2 * UNUSED // dtype.itemsize).to(dtype) for _ in range(2)]
    views = [bases[base][start : start + count * step : step] for base, start, count, step in early]
    middle = bases[0].numel() // 2
    views += [bases[base][middle + start :][: count * step : step] for base, start, count, step in late]
    snapshots = Snapshots()
    for _ in range(2):
        snapshot = snapshots.take(views)
        copies = snapshot.wait()
        assert all(itertools.starmap(torch.equal, zip(views, copies, strict=True)))
        assert [view.stride() for view in views] == [copy.stride() for copy in copies]
        for (one, copy), (two, other) in itertools.combinations(zip(views, copies, strict=True), 2):
            assert _distance(one, two) == _distance(copy, other)
        snapshot.release()
        bases[0].mul_(3)


def _distance(one: torch.Tensor, two: torch.Tensor) -> int | None:
    """Return how far apart two tensors begin if they share a storage."""
    if not one.numel() or not two.numel() or one.untyped_storage()._cdata != two.untyped_storage()._cdata:
        return None
    return one.data_ptr() - two.data_ptr()


def test_a_state_without_tensors_is_copied_without_torch() -> None:
    """A format of the user's own may not need it."""
    code = (
        "import sys; from checkpointer.formats.snapshot import Snapshots; state = {'a': [1]}; "
        "copy = Snapshots().take(state).wait(); state['a'].clear(); print(copy, 'torch' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "{'a': [1]} False\n" == printed


def test_large_tensors_are_copied_by_several_threads_and_by_one_if_no_more_can_be_started() -> None:
    """Each byte once, whatever the sizes are; and while the copy runs, other Python threads run."""
    state = {
        "large": torch.randn(5_000_003),
        "odd": torch.arange(4_200_001, dtype=torch.int32)[3:],
        "turned": torch.randn(301, 1001).t(),
        "bytes": torch.randint(0, 255, (9_000_001,), dtype=torch.uint8).view(torch.bool),
        "half": torch.randn(40_000).bfloat16(),
        "small": torch.ones(3),
    }
    snapshots = Snapshots()
    for stack in (0, 1 << 60):
        before = threading.stack_size(stack)
        try:
            snapshot = snapshots.take(state)
        finally:
            threading.stack_size(before)
        copy = snapshot.wait()
        for name, tensor in state.items():
            assert tensor.stride() == copy[name].stride()
            assert torch.equal(raw(tensor), raw(copy[name]))
        snapshot.release()
        state["large"].mul_(2)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose values are the bytes of another one."""
    return tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor.contiguous().view(torch.int16)
