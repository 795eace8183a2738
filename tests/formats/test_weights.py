"""Which tensors of a payload are the model: found by structure, names and shapes, the same for every command."""

from __future__ import annotations

import collections
import io
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Final

import pytest
import torch
from checkpointer_torch import Loop, load_weights
from support.commands import command
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

from checkpointer import CheckpointManager, EverySteps, KeepAll, KeepLast, Policy
from checkpointer.errors import CorruptError, MismatchError, RestoreError, SaveError, UnsafePayloadError
from checkpointer.formats import open_format
from checkpointer.formats.export import write_weights
from checkpointer.formats.inspection.find_weights import Weights, weights_of
from checkpointer.formats.inspection.payload import open_contents, open_stream
from checkpointer.storage import LocalStorage
from checkpointer.testing import MemoryStorage
from checkpointer.tools.average import average
from checkpointer.tools.diff import Change, diff
from checkpointer.tools.verify import verify_one

safetensors = pytest.importorskip("safetensors.torch", reason="needs torch-checkpointer[safetensors]")
SafetensorError = pytest.importorskip("safetensors").SafetensorError
POLICY: Final = Policy(EverySteps(1), [KeepAll()], name="{step}")


def stored(state: Any, **options: Any) -> MemoryStorage:
    """Return a storage with a state as a torch file."""
    stream = io.BytesIO()
    torch.save(state, stream, **options)
    storage = MemoryStorage()
    storage.write("a.ckpt", stream.getvalue())
    return storage


def found(state: Any, part: str | None = None) -> tuple[str, list[str]]:
    """Return the part and the names of the weights of a state."""
    with open_contents(stored(state), "a.ckpt") as contents:
        weights = weights_of(contents, part)
        return weights.prefix, [*weights.tensors]


def managed(folder: Path, *states: Any, **options: Any) -> Path:
    """Return a directory of this library with these states, at steps 1, 2, ..."""
    states_left = iter(states)
    with CheckpointManager(folder, POLICY, state=lambda: next(states_left), **options) as manager:
        for step in range(1, len(states) + 1):
            manager.observe({}, step=step, epoch=0, epoch_end=False)
    return folder


W: Final = {"w": torch.ones(2), "b": torch.zeros(1)}
V: Final = {"v": torch.ones(3)}


@pytest.mark.parametrize(
    ("state", "part"),
    [
        (W, ""),
        ({"anything": W, "step": 3}, "anything"),
        ({"model": W, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}}, "model"),
        ({"model": W, "step": torch.tensor(7), "rng": torch.zeros(8, dtype=torch.uint8)}, "model"),
        ({"model": W, "criterion": V, "metrics": {"acc": torch.tensor(0.5)}}, "model"),
        ({"state": {"model": W, "optimizers": {"Adam": {"state": {}, "param_groups": []}}}}, "state.model"),
        ({"model": {"encoder": W, "decoder": V}, "step": 1}, "model"),
        ({"state_dict": W, "callbacks": {"Average": {"weights": W}}, "loops": {"a": W}}, "state_dict"),
    ],
)
def test_one_set_of_weights_is_found(state: Any, part: str) -> None:
    """By structure; a usual name counts where other tensors are not a copy of what is under it."""
    assert part == found(state)[0]


@pytest.mark.parametrize(
    ("state", "names"),
    [
        ({"model": W, "ema": W}, r"model \(2 tensors\), ema \(2 tensors\)"),
        ({"ema": W, "net": W}, r"ema \(2 tensors\), net \(2 tensors\)"),
        (
            {"model": W, "ema": {"module.w": W["w"], "module.b": W["b"], "n": torch.tensor(1)}},
            r"model .*ema \(3 tensors",
        ),
        ({"generator": W, "discriminator": V}, r"generator \(2 tensors\), discriminator \(1 tensors\)"),
        ({"model.w": W["w"], "ema.w": W["w"]}, r"model, ema, '' \(2 tensors\)"),
        ({"w": torch.ones(2), "other": V}, r"'' \(1 tensors\), other \(1 tensors\)"),
    ],
)
def test_several_sets_of_weights_are_named_and_none_is_chosen(state: Any, names: str) -> None:
    """The message says what to pass."""
    with pytest.raises(MismatchError, match=rf"several sets of weights may be meant: {names}.*; choose one: part="):
        found(state)


def test_a_part_is_a_key_or_any_path_of_keys() -> None:
    """The empty text takes every tensor; an absent part is an error that names those that exist."""
    state = {"model": {"encoder.w": torch.ones(2), "head.w": torch.ones(3)}, "ema": W}
    assert ("model", ["encoder.w", "head.w"]) == found(state, "model")
    assert ("model.encoder", ["w"]) == found(state, "model.encoder")
    assert ("", ["model.encoder.w", "model.head.w", "ema.w", "ema.b"]) == found(state, "")
    with pytest.raises(RestoreError, match=r"no tensor under 'modle'; the payload has model \(2 tensors\), ema"):
        found(state, "modle")


def test_modules_in_a_file_of_weights_are_named(tmp_path: Path) -> None:
    """If two fit, neither is taken; `part` chooses, and export says the same."""
    a, b, c = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    policy = Policy(EverySteps(1), [KeepLast(1)], contents="weights")
    with pytest.warns(UserWarning, match="cannot resume"):
        loop = Loop(tmp_path, policy, model=a, ema=b)
    with loop:
        for _ in loop.epochs(1):
            for _ in loop.batches([0]):
                loop.step({})
    with pytest.raises(MismatchError, match=r"may be meant: model, ema; choose one: part='model'"):
        load_weights(c, tmp_path)
    load_weights(c, tmp_path, part="model")
    assert torch.equal(a.weight, c.weight)
    said = command("export", tmp_path, "last", tmp_path / "out.pt")
    assert (2, True) == (said.code, "may be meant: model, ema, '' (4 tensors)" in said.err)
    assert 0 == command("export", tmp_path, "last", tmp_path / "out.pt", "--only", "ema").code
    c.load_state_dict(torch.load(tmp_path / "out.pt"), strict=True)
    assert torch.equal(b.weight, c.weight)


class Bert(nn.Module):
    """Has the names and shapes of a small text classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = nn.ModuleDict({str(n): nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32)) for n in range(3)})
        self.classifier = nn.Linear(32, 2)


def test_a_small_module_is_found_by_its_shapes_in_a_large_one() -> None:
    """The one place where they fit; of several places all are named."""
    bert, head, norm = Bert(), nn.Linear(32, 2), nn.LayerNorm(32)
    load_weights(head, bert.state_dict())
    assert torch.equal(bert.classifier.weight, head.weight)
    with pytest.raises(MismatchError, match=r"may be meant: bert.0.1, bert.1.1, bert.2.1; choose one: part='bert.0.1'"):
        load_weights(norm, bert.state_dict())
    bert.bert["1"][1].weight.data.fill_(5.0)  # type: ignore[index]
    load_weights(norm, bert.state_dict(), part="bert.1.1")
    assert 5.0 == norm.weight[0].item()


class Widget(nn.Module):
    """A module of this file's own, with what a `state_dict` leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.scale = nn.Parameter(torch.ones(2))
        self.register_buffer("kept", torch.ones(1))
        self.register_buffer("passing", torch.ones(1), persistent=False)
        self.register_parameter("absent", None)
        self.loose = torch.ones(4)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [lambda module: module, lambda module: {"epoch": 1, "ema": module, "model": None}])
def test_a_pickled_module_has_the_names_of_its_state_dict(wrap: Any, zipped: bool, tmp_path: Path) -> None:
    """Without buffers that are not persistent; it loads into the module that was pickled."""
    widget = Widget()
    storage = stored(wrap(widget), _use_new_zipfile_serialization=zipped)
    with open_contents(storage, "a.ckpt") as contents:
        weights = weights_of(contents)
        assert [*widget.state_dict()] == [*weights.tensors]
        write_weights(tmp_path / "out.pt", weights.tensors, weights.read)
    Widget().load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True), strict=True)


def test_weights_beside_objects_are_read_and_a_restore_says_what_is_refused(tmp_path: Path) -> None:
    """In a directory of ours too; the restore has the option that its message names."""
    state = {"model": W, "when": collections.deque([1])}
    with pytest.warns(UserWarning, match="a safe load refuses"):
        managed(tmp_path, state)
    holder = nn.ParameterDict({"w": torch.zeros(2), "b": torch.zeros(1)})
    load_weights(holder, tmp_path)
    assert torch.equal(torch.ones(2), holder["w"])
    with pytest.raises(UnsafePayloadError, match="weights_only=False"), CheckpointManager(tmp_path) as manager:
        manager.restore()


def test_extra_state_is_loaded_and_export_says_that_it_is_left_out(tmp_path: Path) -> None:
    """It is not a tensor, so a file of tensors cannot hold it."""

    class Extra(nn.Linear):
        extra: Any = None

        def get_extra_state(self) -> Any:
            return {"scale": [1.5], "name": "x"}

        def set_extra_state(self, state: Any) -> None:
            self.extra = state

    managed(tmp_path / "run", {"model": Extra(2, 2).state_dict()})
    model = Extra(2, 2)
    load_weights(model, tmp_path / "run")
    assert {"scale": [1.5], "name": "x"} == model.extra
    said = command("export", tmp_path / "run", 1, tmp_path / "out.pt")
    assert (0, True) == (said.code, "left out, because they are not tensors: _extra_state" in said.err)


def test_of_many_values_that_are_left_out_a_few_are_named(tmp_path: Path) -> None:
    """A state has a value for each of thousands of parameters, and the message stays a line."""
    managed(tmp_path / "run", {"w": torch.ones(1), "seen": {f"n{number}": number for number in range(100)}})
    said = command("export", tmp_path / "run", 1, tmp_path / "out.pt")
    assert (0, True) == (said.code, "seen.n3, seen.n4 and 95 more" in said.err)


def test_the_format_is_what_the_bytes_say(tmp_path: Path) -> None:
    """Not the extension, nor the record: restore, load and verify agree."""
    with CheckpointManager(tmp_path / "run", POLICY, save=lambda path: safetensors.save_file(W, path)) as manager:
        manager.observe({}, step=1, epoch=0)
        restored = manager.restore(contents="any")
        assert restored is not None
        assert torch.equal(W["w"], restored.state["w"])
        assert verify_one(LocalStorage(tmp_path / "run", ""), manager.records[0], "contents")
        mapped = manager.restore(contents="any", mmap=True)
        assert mapped is not None
        assert torch.equal(W["w"], mapped.state["w"])
    torch.save(W, tmp_path / "a.safetensors")
    holder = nn.ParameterDict({"w": torch.zeros(2), "b": torch.zeros(1)})
    load_weights(holder, tmp_path / "a.safetensors")
    assert torch.equal(W["w"], holder["w"])


# Large and deep files


def test_many_parameters_and_deep_nesting_are_sound(tmp_path: Path) -> None:
    """50 000 parameters with their Adam states, and 200 levels."""
    small = torch.zeros(1)
    model = {f"layer.{number}.weight": small for number in range(50_000)}
    adam = {number: {"step": small, "exp_avg": small, "exp_avg_sq": small} for number in range(50_000)}
    deep: Any = {"w": small}
    for _ in range(200):
        deep = [deep]
    groups = [{"lr": 0.1, "params": [*range(50_000)]}]
    managed(tmp_path, {"model": model, "optimizer": {"state": adam, "param_groups": groups}, "deep": deep})
    with open_contents(LocalStorage(tmp_path, ""), "step=1.ckpt") as contents:
        assert [] == [*contents.problems()]
        assert 200_001 == len(contents.tensors)
        assert 50_000 == len(weights_of(contents).tensors)


# What is not a plain tensor of numbers


def weights_in(state: Any) -> tuple[str, Weights]:
    """Return weights that stay open."""
    return "a.ckpt", weights_of(open_stream(stored(state).open("a.ckpt"), "a.ckpt"))


def changes(before: Any, after: Any) -> list[Change]:
    """Return what changed."""
    with open_contents(stored(before), "a.ckpt") as one, open_contents(stored(after), "a.ckpt") as two:
        return [*diff(one, two)]


LAZY: Final = {
    "conj": torch.tensor([1 + 2j, 3 - 4j]).conj(),
    "imag": torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
    "neg": torch._neg_view(torch.tensor([1.0, -2.0])),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", LAZY)
def test_lazily_conjugated_and_negated_tensors_have_their_values(name: str, suffix: str, tmp_path: Path) -> None:
    """As torch reads them, in a diff, an average and an export."""
    value = LAZY[name]
    plain = value.clone().resolve_conj().resolve_neg()
    assert not any(changes({"w": value}, {"w": plain}))
    assert torch.equal(plain, average([weights_in({"w": value}), weights_in({"w": value})]).read("w"))
    _, weights = weights_in({"w": value})
    write_weights(tmp_path / f"out{suffix}", weights.tensors, weights.read)
    load = torch.load if suffix == ".pt" else safetensors.load_file
    try:
        written = load(tmp_path / f"out{suffix}")["w"]
    except SafetensorError:
        pytest.skip("safetensors before 0.7 does not read complex numbers")
    assert torch.equal(plain, written)


BYTES: Final = torch.arange(4, dtype=torch.uint8)
SCALES: Final = torch.tensor([0.1, 0.2, 0.3])
SPECIAL: Final[dict[str, Callable[[], torch.Tensor]]] = {
    "coo": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "qint8": lambda: torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8),
    "channels": lambda: torch.quantize_per_channel(torch.randn(3, 2), SCALES, torch.zeros(3), 0, torch.qint8),
    "packed": lambda: torch.quantize_per_channel(torch.randn(3, 5), SCALES, torch.zeros(3), 0, torch.quint4x2),
    "bits": lambda: BYTES.view(torch.bits8),
    "float4": lambda: BYTES.view(getattr(torch, "float4_e2m1fn_x2", torch.bits8)),
}
old = pytest.mark.filterwarnings("ignore:.*quant", "ignore:.*[Ss]parse", "ignore:.*TypedStorage")
"""What torch says of its old kinds of tensors."""


@old
@pytest.mark.parametrize("name", SPECIAL)
def test_what_is_not_made_of_numbers_is_verified_compared_exported_and_not_averaged(name: str, tmp_path: Path) -> None:
    """The mean of two quantised or sparse tensors is not the mean of their parts: it is refused by name."""
    value = SPECIAL[name]()
    managed(tmp_path / "run", {"model": {"w": value}}, {"model": {"w": value}})
    assert 0 == command("verify", tmp_path / "run", "--deep").code
    assert 0 == command("show", tmp_path / "run", 1).code
    assert 0 == command("diff", tmp_path / "run", 1, 2).code
    said = command("average", tmp_path / "run", 1, 2, "-o", tmp_path / "mean.pt")
    assert (2, True) == (said.code, "w in step=1.ckpt is " in said.err)
    assert 0 == command("export", tmp_path / "run", 1, tmp_path / "out.pt").code
    again = torch.load(tmp_path / "out.pt")["w"]
    assert (value.dtype, value.layout, value.shape) == (again.dtype, again.layout, again.shape)
    assert not any(changes({"w": value}, {"w": again}))


class Made:
    """Pickles as a call."""

    def __init__(self, what: Any, *args: Any) -> None:
        self.made = what, args

    def __reduce__(self) -> Any:
        return self.made


def rebuilt(name: str, *args: Any) -> Made:
    """Return what pickles as a call of a function of torch's that makes a tensor."""
    return Made(getattr(torch._utils, name), *args)


@old
@pytest.mark.parametrize("name", ["far index", "many scales", "large"])
def test_special_tensors_that_lie_are_refused(name: str) -> None:
    """Indices beyond the shape, scales for another shape, and a few bytes for very many elements."""
    layout = Made(torch.serialization._get_layout, "torch.sparse_coo")
    storage = torch.zeros(4, dtype=torch.int8).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.qint8, _internal=True)  # type: ignore[no-untyped-call]
    rows = (torch.per_channel_affine, torch.ones(3).double(), torch.zeros(3).long(), 0)
    one = (torch.per_tensor_affine, 1.0, 0)
    lies = {
        "far index": rebuilt(
            "_rebuild_sparse_tensor", layout, (torch.tensor([[9]]), torch.ones(1), torch.Size([2]), True)
        ),
        "many scales": rebuilt("_rebuild_qtensor", typed, 0, (2, 2), (2, 1), rows, False, {}),
        "large": rebuilt("_rebuild_qtensor", typed, 0, (1 << 40,), (0,), one, False, {}),
    }
    with open_contents(stored({"w": lies[name]}), "a.ckpt") as contents:
        assert ["w"] == [*contents.tensors]
        with pytest.raises(CorruptError, match="w "):
            contents.read("w")


@old
def test_a_change_in_what_is_not_made_of_numbers_is_seen() -> None:
    """By its numbers where it stands for some, else by its bytes."""
    half = torch.quantize_per_tensor(torch.tensor([0.5]), 0.1, 0, torch.qint8)
    one = torch.quantize_per_tensor(torch.tensor([1.0]), 0.1, 0, torch.qint8)
    (change,) = changes({"w": half}, {"w": one})
    assert 0.5 == pytest.approx(change.norm)
    (change,) = changes({"w": torch.eye(2).to_sparse()}, {"w": (2 * torch.eye(2)).to_sparse()})
    assert 1.0 == change.max
    (change,) = changes({"w": BYTES.view(torch.bits8)}, {"w": (BYTES + 1).view(torch.bits8)})
    assert ("changed", True) == (change.kind, change.norm != change.norm)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.bfloat16])
def test_every_dtype_with_numbers_is_averaged(dtype: torch.dtype) -> None:
    """In double precision, rounded once."""
    states = [{"w": torch.full((2,), value).to(dtype)} for value in (1.0, 2.0)]
    assert [1.5, 1.5] == average([weights_in(state) for state in states]).read("w").to(torch.complex64).real.tolist()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64])
def test_integers_beyond_double_precision_are_compared_exactly(dtype: torch.dtype) -> None:
    """2 ** 53 and 2 ** 53 + 1 are one double."""
    one, two = (torch.tensor([2**53 + add, 5]).to(dtype) for add in (0, 1))
    (change,) = changes({"n": one}, {"n": two})
    assert ("changed", 1.0) == (change.kind, change.max)
    (change,) = changes({"n": torch.tensor([-(2**63)])}, {"n": torch.tensor([2**63 - 1])})
    assert 2.0**64 == change.max


def test_parametrised_weights_are_not_averaged_part_by_part() -> None:
    """Length and direction of a weight apart have other means than the weight; names that only look so are fine."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modules = {
            "weight_g": torch.nn.utils.weight_norm(nn.Linear(3, 2)),
            "parametrizations.weight.original0": parametrizations.weight_norm(nn.Linear(3, 2)),
            "weight_orig": torch.nn.utils.spectral_norm(nn.Linear(3, 2)),
        }
    for name, module in modules.items():
        source = weights_in(module.state_dict())
        with pytest.raises(RestoreError, match=f"{name} in a.ckpt .*remove_parametrizations"):
            average([source, source])
    plain = weights_in({"gate_g": torch.ones(2, 2), "gate_v": torch.ones(2, 2), "gru_g": torch.ones(3)})
    assert torch.equal(torch.ones(2, 2), average([plain, plain]).read("gate_g"))


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64", "complex64"])
def test_safetensors_holds_what_the_installed_version_holds(name: str, tmp_path: Path) -> None:
    """What it cannot read is refused by name; what it can comes back, and plain safetensors reads it."""
    dtype = getattr(torch, name)
    value = torch.arange(6).to(torch.float32).to(dtype).reshape(2, 3)
    try:
        open_format("safetensors").write({"w": value}, io.BytesIO())
    except SaveError:
        with pytest.raises((KeyError, SafetensorError)):
            safetensors.load(safetensors.save({"w": value}))
        return
    managed(tmp_path, {"w": value}, format="safetensors")
    read = safetensors.load_file(tmp_path / "step=1.safetensors")["w"]
    with CheckpointManager(tmp_path, format="safetensors") as manager:
        restored = manager.restore(contents="any")
    assert restored is not None
    for again in (read, restored.state["w"]):
        assert (dtype, [*range(6)]) == (again.dtype, again.to(torch.complex64).real.flatten().int().tolist())


# Files from before torch 1.6, and of Python 2


class Python2(pickle._Pickler):  # Written in Python, so that it can be changed.
    """Writes pickles as Python 2 did: text is bytes, and an ordered dict is made of a list of lists."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)

    def save_text(self, text: str) -> None:
        data = text.encode("latin-1")
        pickler: Any = self
        pickler.write(b"T" + struct.pack("<i", len(data)) + data)
        pickler.memoize(text)

    dispatch[str] = save_text

    def persistent_id(self, value: Any) -> Any:
        return value.id if isinstance(value, Stored) else None


class Stored:
    """A storage as torch 0.3 wrote it; with ``view`` a part of it."""

    def __init__(self, key: str, count: int, view: Any = None) -> None:
        self.id = ("storage", torch.FloatStorage, key, "cpu", count, view)


class Rebuilt:
    """A tensor as torch 0.3 wrote it."""

    def __init__(self, storage: Stored, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.args = storage, offset, shape, stride

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor, self.args


class Ordered:
    """A `collections.OrderedDict` as Python 2 wrote it."""

    def __init__(self, items: dict[str, Any]) -> None:
        self.items = [[key, value] for key, value in items.items()]

    def __reduce__(self) -> Any:
        return collections.OrderedDict, (self.items,)


def python_2_file() -> bytes:
    """Return what torch 0.3 under Python 2 wrote of a linear layer and a batch normalisation without a counter."""
    state = {
        "0.weight": Rebuilt(Stored("94", 4), 0, (2, 2), (2, 1)),
        "0.bias": Rebuilt(Stored("95", 6, ("96", 2, 4)), 1, (2,), (1,)),
        **{f"1.{name}": Rebuilt(Stored("95", 6), 0, (2,), (1,)) for name in ("weight", "bias", "running_mean")},
        "1.running_var": Rebuilt(Stored("95", 6), 4, (2,), (1,)),
    }
    stream = io.BytesIO()
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    root = {"arch": "r\xe9seau", "state_dict": Ordered(state), "best": 0.5}
    for part in (0x1950A86A20F9469CFC6C, 1001, system, root, ["94", "95"]):
        Python2(stream, 2).dump(part)
    for numbers in ([1.0, 2.0, 3.0, 4.0], [10.0, 11.0, 12.0, 13.0, 14.0, 15.0]):
        stream.write(struct.pack("<q", len(numbers)) + struct.pack(f"<{len(numbers)}f", *numbers))
    return stream.getvalue()


def test_a_file_of_python_2_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    """Loaded, exported and compared; a counter that torch did not have then is not missing."""
    path = tmp_path / "old.pth"
    path.write_bytes(python_2_file())
    expected = torch.load(path, weights_only=False, encoding="latin-1")["state_dict"]
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    load_weights(model, path)
    for name, value in expected.items():
        assert torch.equal(value, model.state_dict()[name])
    with open_contents(LocalStorage(tmp_path, ""), "old.pth") as contents:
        assert ("réseau", [], ()) == (contents.others["arch"], [*contents.problems()], contents.calls)
        weights = weights_of(contents)
        write_weights(tmp_path / "out.pt", weights.tensors, weights.read)
        assert not any(diff(contents, contents))
    model.load_state_dict(torch.load(tmp_path / "out.pt"), strict=True)


@pytest.mark.parametrize("name", ["python 2", "legacy"])
def test_a_legacy_file_that_was_cut_or_changed_is_an_error_of_ours(name: str) -> None:
    """No bare OSError, whatever length stands before a storage."""
    legacy = stored({"model": W}, _use_new_zipfile_serialization=False).open("a.ckpt").read()
    whole = python_2_file() if name == "python 2" else legacy
    for cut in range(1, len(whole)):
        storage = MemoryStorage()
        storage.write("a.ckpt", whole[:cut] if cut % 2 else whole[:cut] + b"\xff" * 8 + whole[cut + 8 :])
        try:
            with open_contents(storage, "a.ckpt") as contents:
                if not [*contents.problems()]:
                    assert contents.tensors.keys() == {
                        name for name in contents.tensors if contents.read(name) is not None
                    }
        except CorruptError:
            pass


def test_averaged_models_and_the_model_are_distinguished() -> None:
    """`AveragedModel` puts the module under a prefix: both fit, and both are named."""
    model = nn.Linear(2, 2)
    state = {"model": model.state_dict(), "swa": AveragedModel(model).state_dict()}
    with pytest.raises(MismatchError, match=r"may be meant: model \(2 tensors\), swa.module; choose"):
        load_weights(nn.Linear(2, 2), state)
