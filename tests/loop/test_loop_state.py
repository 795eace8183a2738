"""What is saved of each kind of object, and what fits where."""

from __future__ import annotations

import argparse
import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpointer_torch import Loop, load_weights
from checkpointer_torch.object_parts import ModulePart, OptimizerPart
from checkpointer_torch.random_state import accessors, put_random_state, take_random_state
from checkpointer_torch.state_differences import are_alike
from small import POLICY, Small, make_net
from torch import nn
from torch.ao.quantization import PerChannelMinMaxObserver
from torch.optim.swa_utils import AveragedModel

from checkpointer import CheckpointerWarning, CheckpointManager, EverySteps, KeepAll, KeepLast, Policy
from checkpointer.errors import MismatchError, NotFoundError, ObservationError, PolicyError

EVERY = Policy(EverySteps(1), [KeepAll()])


@dataclasses.dataclass
class Counters:
    """What a training counts."""

    seen: int = 0
    best: float = 1.0
    names: list[str] = dataclasses.field(default_factory=list)


def one_step(directory: Path, **objects: Any) -> None:
    """Save these objects once."""
    with Loop(directory, EVERY, **objects) as loop:
        for _ in loop.epochs(1):
            for _ in loop.batches([0]):
                loop.step()


def resumed(directory: Path, *, strict: bool = True, **objects: Any) -> Loop:
    """Return a loop that has gone on with them."""
    with Loop(directory, EVERY, **objects) as loop:
        loop.resume(strict=strict)
    return loop


def payload(directory: Path) -> Any:
    """Return the newest payload, as torch.load reads it."""
    name = CheckpointManager(directory).records[-1].name
    return torch.load(directory / name, weights_only=True)


def compiled(module: nn.Module) -> nn.Module:
    """Wrap, without compiling: that happens at the first call."""
    return torch.compile(module)  # type: ignore[return-value]


def parallel(module: nn.Module) -> nn.Module:
    """Wrap for several devices."""
    return nn.DataParallel(module)


def compiled_within(module: nn.Module) -> nn.Module:
    """Wrap a part only."""
    module[0] = torch.compile(module[0])  # type: ignore[operator, index]
    return module


WRAPPERS: list[Callable[[nn.Module], nn.Module]] = [
    lambda module: module,
    compiled,
    parallel,
    compiled_within,
    lambda module: compiled(parallel(module)),
]


@pytest.mark.parametrize("saved", WRAPPERS)
@pytest.mark.parametrize("loaded", WRAPPERS)
def test_wrapped_modules_have_plain_names_in_the_file_and_load_into_either(
    saved: Callable[[nn.Module], nn.Module], loaded: Callable[[nn.Module], nn.Module]
) -> None:
    """A checkpoint does not depend on whether the run was compiled or parallel; versions of layers are saved too."""
    plain, source, target = make_net(), make_net(), make_net()
    state = ModulePart(saved(source)).take()
    assert list(plain.state_dict()) == list(state)
    assert plain.state_dict()._metadata == state._metadata  # type: ignore[attr-defined]
    wrapped = ModulePart(loaded(target))
    assert not wrapped.compare(state)
    wrapped.put(state)
    assert all(torch.equal(value, wrapped.take()[name]) for name, value in state.items())


def test_a_name_that_only_looks_like_a_wrapper_stays() -> None:
    """A module may call a part of its own ``module``."""
    model = nn.ModuleDict({"module": nn.Linear(1, 1)})
    assert ["module.weight", "module.bias"] == list(ModulePart(model).take())


def test_every_kind_of_object_comes_back(tmp_path: Path) -> None:
    """In a file that a safe load reads without this library."""

    def make(number: int) -> dict[str, Any]:
        model = nn.Linear(2, 2)
        return {
            "model": model,
            "ema": AveragedModel(model),
            "optimizer": torch.optim.SGD(model.parameters(), lr=0.1 * number, momentum=0.9),
            "scaler": torch.amp.GradScaler("cpu", init_scale=2.0**number),
            "drawn": torch.Generator().manual_seed(number),
            "dice": random.Random(number),
            "bits": np.random.default_rng(number),
            "philox": np.random.Generator(np.random.Philox(number)),
            "legacy": np.random.RandomState(number),
            "tensor": torch.full((3,), float(number)),
            "counters": Counters(seen=number, names=["a"] * number),
            "extra": {"k": [number]},
            "seen": number,
        }

    first, second = make(1), make(2)
    with Loop(tmp_path, EVERY, **first) as loop:
        for _ in loop.steps(1):
            first["counters"].seen += 4
            first["counters"].names.append("b")
            first["extra"]["k"].append(6)
            loop.step()
    assert {*first, "loop"} == set(payload(tmp_path))
    loop = resumed(tmp_path, **second)
    assert torch.equal(first["model"].weight, second["model"].weight)
    assert torch.equal(first["ema"].module.weight, second["ema"].module.weight)
    assert (0.1, 2.0) == (second["optimizer"].param_groups[0]["lr"], second["scaler"].get_scale())
    assert torch.equal(torch.rand(2, generator=first["drawn"]), torch.rand(2, generator=second["drawn"]))
    assert first["dice"].random() == second["dice"].random()
    for name in ("bits", "philox", "legacy"):
        assert first[name].normal() == second[name].normal(), name
    assert torch.equal(torch.ones(3), second["tensor"])
    assert Counters(seen=5, names=["a", "b"]) == second["counters"]
    assert ({"k": [1, 6]}, 1) == (second["extra"], loop["seen"])


def test_a_plain_value_is_held_by_the_loop(tmp_path: Path) -> None:
    """It cannot be changed in place; a name that was not given would not be saved, and is an error."""
    with Loop(tmp_path, EVERY, seen=0) as loop:
        for _ in loop.epochs(1):
            for _ in loop.batches(range(3)):
                loop["seen"] += 32
                loop.step()
        with pytest.raises(KeyError, match=r"^the loop holds no value 'other' \(have: seen\)"):
            loop["other"] = 1
    assert 96 == resumed(tmp_path, seen=0)["seen"]


def test_random_numbers_go_on_where_they_were() -> None:
    """Those of python with its half-drawn pair, of numpy with its, and of torch."""

    def draw() -> tuple[Any, ...]:
        return random.gauss(0, 1), float(np.random.normal()), torch.rand(2).tolist(), random.random()

    draw()
    state = take_random_state()
    drawn = draw()
    put_random_state(state)
    assert drawn == draw()


@pytest.mark.cuda
def test_every_cuda_device_goes_on_where_it_was() -> None:
    """Dropout on a GPU draws from its own generator."""
    devices = range(torch.cuda.device_count())
    for device in devices:
        torch.rand(1, device=f"cuda:{device}")
    state = take_random_state()
    drawn = [torch.rand(3, device=f"cuda:{device}").cpu() for device in devices]
    put_random_state(state)
    again = [torch.rand(3, device=f"cuda:{device}").cpu() for device in devices]
    assert all(map(torch.equal, drawn, again))


def test_a_checkpoint_of_other_objects_is_one_error_that_names_all_and_nothing_is_loaded(tmp_path: Path) -> None:
    """Missing, unexpected and reshaped, of the objects and of their keys."""
    saved = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    one_step(tmp_path, model=saved, optimizer=torch.optim.Adam(saved.parameters()), old=1)
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 1, bias=False), nn.Linear(1, 1))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters())
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "new": torch.ones(1)}
    wanted = (
        r"step=1.ckpt does not fit this training, and nothing was loaded: missing: new, model.2.weight, model.2.bias; "
        r"unexpected: old, model.1.bias; of another shape or type: model.0.weight \(here \[2, 4\], there \[2, 3\]\), "
        r"optimizer.param_groups\[0\].params \(here 5, there 4\)"
    )
    with pytest.raises(MismatchError, match=wanted):
        resumed(tmp_path, **parts)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with pytest.warns(CheckpointerWarning, match="does not fit, so only a part was loaded"):
        resumed(tmp_path, strict=False, **parts)
    assert torch.equal(saved.state_dict()["1.weight"], model.state_dict()["1.weight"])
    assert torch.equal(before["0.weight"], model.state_dict()["0.weight"])


def test_an_optimizer_of_other_shapes_is_seen_before_anything_is_loaded(tmp_path: Path) -> None:
    """Its state has numbers for names, so only shapes can be compared."""

    def make(width: int) -> torch.optim.Optimizer:
        weight = nn.Parameter(torch.ones(width))
        weight.grad = torch.ones(width)
        optimizer = torch.optim.Adam([weight])
        optimizer.step()
        return optimizer

    one_step(tmp_path, optimizer=make(3))
    other = make(4)
    with pytest.raises(MismatchError, match=r"optimizer.state\[0\].exp_avg \(here \[4\], there \[3\]\)"):
        resumed(tmp_path, optimizer=other)
    with pytest.warns(CheckpointerWarning, match="only a part was loaded: .*; not loaded at all: optimizer$"):
        resumed(tmp_path, strict=False, optimizer=other)
    assert [4] == list(other.state_dict()["state"][0]["exp_avg"].shape)


class Projected(torch.optim.Optimizer):
    """Keeps its state in another shape than its parameter has, as GaLore does, or SPAM."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("exp_avg", torch.zeros(2)).add_(1)


def test_an_optimizer_that_keeps_its_state_in_another_shape_goes_on(tmp_path: Path) -> None:
    """What it would load itself is loaded; the number of its parameters is still compared."""

    def make(count: int) -> Projected:
        return Projected([nn.Parameter(torch.ones(5, 3)) for _ in range(count)])

    first, second = make(1), make(1)
    first.step()
    one_step(tmp_path, optimizer=first)
    resumed(tmp_path, optimizer=second)
    assert [1.0, 1.0] == second.state_dict()["state"][0]["exp_avg"].tolist()
    with pytest.raises(MismatchError, match=r"optimizer.param_groups\[0\].params \(here 2, there 1\)"):
        resumed(tmp_path, optimizer=make(2))


class Wide(torch.optim.Optimizer):
    """Keeps types of its own, whatever its parameter has, as the Adafactor of transformers does."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                average = parameter.grad.float() / 3
                self.state[parameter] |= {"exp_avg": average, "seen": torch.tensor(2**40 + 1), "mask": average > 0}


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.NAdam, Wide])
def test_a_state_of_another_type_than_its_parameter_comes_back_as_it_was(
    tmp_path: Path, kind: Callable[..., torch.optim.Optimizer]
) -> None:
    """torch converts each one: NAdam's float32 product would be rounded to bfloat16, and a mask would become floats."""

    def make() -> torch.optim.Optimizer:
        weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        weight.grad = torch.ones_like(weight)
        return kind([weight])

    first, second = make(), make()
    for _ in range(2):
        first.step()
    one_step(tmp_path, optimizer=first)
    resumed(tmp_path, optimizer=second)
    saved, here = (optimizer.state_dict()["state"][0] for optimizer in (first, second))
    assert {key: value.dtype for key, value in saved.items()} == {key: value.dtype for key, value in here.items()}
    assert all(torch.equal(value, here[key]) for key, value in saved.items())


class Nested(torch.optim.Optimizer):
    """Keeps its tensors in a dict within the state, as heavyball does, and in lists, beside texts."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                third = parameter.grad.float() / 3
                self.state[parameter] |= {
                    0: {"exp_avg": third, "set_up": {"exp_avg"}},
                    "history": [third, (third, "first")],
                    "mode": "train",
                    "key": b"ab",
                }


def bfloat16_parameter() -> nn.Parameter:
    """Return one with a gradient."""
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    return parameter


def test_values_within_the_state_of_a_parameter_come_back_as_they_were(tmp_path: Path) -> None:
    """torch rounds tensors in dicts and lists too, and turns a text into the name of a generator."""
    first, second = Nested([bfloat16_parameter()]), Nested([bfloat16_parameter()])
    first.step()
    one_step(tmp_path, optimizer=first)
    resumed(tmp_path, optimizer=second)
    saved, here = (optimizer.state_dict()["state"][0] for optimizer in (first, second))
    assert are_alike([saved, here])
    assert {"mode": "train", "key": b"ab"} == {key: here[key] for key in ("mode", "key")}
    assert torch.float32 == here[0]["exp_avg"].dtype == here["history"][1][0].dtype


class Linked(torch.optim.Optimizer):
    """Refers to the group of a parameter in its state, as optimi does with ``gradient_release``."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1.0})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["group"] = group

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for parameter, state in self.state.items():
                parameter -= state["group"]["lr"]


def test_a_state_that_refers_to_a_group_follows_a_scheduler_after_a_resume(tmp_path: Path) -> None:
    """torch loads a copy of the group, whose learning rate stays as it was saved."""

    def make() -> dict[str, Any]:
        optimizer = Linked([nn.Parameter(torch.ones(1))])
        return {"optimizer": optimizer, "scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)}

    one_step(tmp_path, **make())
    second = make()
    resumed(tmp_path, **second)
    optimizer = second["optimizer"]
    optimizer.step()
    second["scheduler"].step()
    assert [0.5] == [state["group"]["lr"] for state in optimizer.state.values()]


class Named(torch.optim.AdamW):
    """Torch's own optimizer under another name."""


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adafactor, torch.optim.Adamax, Named])
def test_a_model_of_a_smaller_type_goes_on_with_the_states_of_torchs_optimizers(
    tmp_path: Path, kind: Callable[..., torch.optim.Optimizer]
) -> None:
    """They keep arrays in the type of the parameter, and raise at the next step if an array has another one."""

    def make(dtype: torch.dtype) -> torch.optim.Optimizer:
        weight = nn.Parameter(torch.ones(3, 2, dtype=dtype))
        weight.grad = torch.ones_like(weight)
        return kind([weight])

    first, second = make(torch.float32), make(torch.bfloat16)
    first.step()
    one_step(tmp_path, optimizer=first)
    resumed(tmp_path, optimizer=second)
    second.step()
    arrays = [value for value in second.state_dict()["state"][0].values() if value.dim()]
    assert {torch.bfloat16} == {value.dtype for value in arrays}


def test_a_module_that_takes_another_shape_by_itself_goes_on(tmp_path: Path) -> None:
    """The observers of a quantisation are empty until the first batch. A module that refuses the shape is refused."""
    observer, other = PerChannelMinMaxObserver(), PerChannelMinMaxObserver()
    observer(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    one_step(tmp_path / "observer", model=nn.Sequential(observer))
    resumed(tmp_path / "observer", model=nn.Sequential(other))
    assert [1.0, 3.0] == other.min_val.tolist()

    one_step(tmp_path / "norm", model=nn.Sequential(nn.BatchNorm1d(2)))
    with pytest.raises(MismatchError, match=r"model.0.running_mean \(here \[3\], there \[2\]\)"):
        resumed(tmp_path / "norm", model=nn.Sequential(nn.BatchNorm1d(3)))


def test_a_lazy_module_goes_on_before_its_first_batch(tmp_path: Path) -> None:
    """The saved weights give it its shapes, at a resume and as weights to start from."""

    def made() -> dict[str, Any]:
        model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
        return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)}

    first, second, third = made(), made(), made()
    first["model"](torch.rand(4, 2)).square().mean().backward()
    first["optimizer"].step()
    one_step(tmp_path, **first)
    resumed(tmp_path, **second)
    load_weights(third["model"], tmp_path)
    states = [objects["model"].state_dict() for objects in (first, second, third)]
    assert all(torch.equal(value, other[key]) for other in states[1:] for key, value in states[0].items())
    buffers = [
        [one["momentum_buffer"].tolist() for one in objects["optimizer"].state.values()] for objects in (first, second)
    ]
    assert buffers[0] == buffers[1] != []


class Growing(nn.Linear):
    """A module whose extra state is a tensor that becomes longer, as that of a Transformer Engine layer may."""

    history = torch.zeros(0)

    def get_extra_state(self) -> torch.Tensor:
        return self.history

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.history = state


def test_an_extra_state_may_have_another_shape(tmp_path: Path) -> None:
    """Its module takes it. This is so at a resume, and for weights to start from."""
    first, second, third = (Growing(2, 1) for _ in range(3))
    first.history = torch.ones(3)
    one_step(tmp_path, model=first)
    resumed(tmp_path, model=second)
    load_weights(third, tmp_path)
    assert [[1.0, 1.0, 1.0]] * 2 == [second.history.tolist(), third.history.tolist()]


class Quantised(nn.Linear):
    """A layer that saves its scale and does not take it back, as a Linear4bit of bitsandbytes."""

    scale = 1.0

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight.scale"] = torch.tensor(self.scale)


def test_a_value_that_a_module_saves_and_does_not_take_back_is_named(tmp_path: Path) -> None:
    """If it is the same as before, nothing is lost and nothing is said."""
    one_step(tmp_path, model=nn.Sequential(Quantised(2, 1)))
    resumed(tmp_path, model=nn.Sequential(Quantised(2, 1)))
    other = Quantised(2, 1)
    other.scale = 2.0
    with pytest.warns(CheckpointerWarning, match=r"saves 0\.weight\.scale, and its load_state_dict does not take"):
        resumed(tmp_path, model=nn.Sequential(other))


def test_states_of_an_optimizer_with_texts_for_numbers_are_refused(tmp_path: Path) -> None:
    """Torch ignores them, so the optimizer would begin anew. Conversions of a DCP checkpoint write such states."""
    net = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    texts = {**state, "state": {str(key): value for key, value in state["state"].items()}}
    assert ("state['0']", "state['1']") == OptimizerPart(optimizer).compare(texts).unexpected
    assert not OptimizerPart(optimizer).compare(state)


class Around(torch.optim.Optimizer):
    """An optimizer around another one, whose state has two parts and none of the usual keys."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self.param_groups = inner.param_groups
        self.slow = torch.zeros(1)

    def step(self) -> None:  # type: ignore[override]
        self.inner.step()
        self.slow += 1

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict(), "slow": self.slow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])
        self.slow = state["slow"].clone()


def test_an_optimizer_whose_state_has_a_form_of_its_own_goes_on(tmp_path: Path) -> None:
    """Lookahead of pytorch_optimizer is one. An optimizer of torch's form refuses it before anything is loaded."""

    def make() -> tuple[nn.Module, Around]:
        model = nn.Linear(3, 1)
        return model, Around(torch.optim.Adam(model.parameters()))

    model, optimizer = make()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    one_step(tmp_path, model=model, optimizer=optimizer)

    model, optimizer = make()
    resumed(tmp_path, model=model, optimizer=optimizer)
    assert 1.0 == optimizer.slow.item()
    assert 2 == len(optimizer.inner.state_dict()["state"])

    model = nn.Linear(3, 1)
    before = model.weight.detach().clone()
    with pytest.raises(MismatchError, match=r"optimizer\.param_groups"):
        resumed(tmp_path, model=model, optimizer=torch.optim.Adam(model.parameters()))
    assert torch.equal(before, model.weight)


def two_layers(order: str, *, is_named: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model, and an optimizer that has its two weights in this order."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in "ab"})
    weights: list[Any] = [(f"{name}.weight", model[name].weight) for name in order]
    return model, torch.optim.Adam(weights if is_named else [weight for _, weight in weights])


def step_of_two(model: Any, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Train one step, and return the averages of the gradients of the weights a and b."""
    optimizer.zero_grad()
    model["a"](torch.ones(1, 2)).sum().backward()
    model["b"](5 * torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return averages(model, optimizer)


def averages(model: Any, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return the averages of the gradients of the weights a and b."""
    return [optimizer.state[model[name].weight]["exp_avg"] for name in "ab"]


@pytest.mark.parametrize("is_named", [False, True])
def test_each_parameter_gets_its_own_state_back_if_their_order_is_another_one(
    tmp_path: Path, *, is_named: bool
) -> None:
    """A program that made its groups from a set has another order in each process."""
    model, optimizer = two_layers("ab", is_named=is_named)
    expected = step_of_two(model, optimizer)
    one_step(tmp_path, model=model, optimizer=optimizer)
    model, optimizer = two_layers("ba", is_named=is_named)
    resumed(tmp_path, model=model, optimizer=optimizer)
    assert all(map(torch.equal, expected, averages(model, optimizer)))
    if is_named:
        assert ["b.weight", "a.weight"] == optimizer.param_groups[0]["param_names"]


def test_a_tied_weight_has_one_name_in_the_order_of_parameters(tmp_path: Path) -> None:
    """It is found again if the tied modules change places."""
    for order in ("ab", "ba"):
        tied = nn.Parameter(torch.ones(2, 2))
        model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in order})
        for name in order:
            model[name].weight = tied
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if order == "ab":
            one_step(tmp_path, model=model, optimizer=optimizer)
        else:
            assert 1 == resumed(tmp_path, model=model, optimizer=optimizer).progress.step


def test_a_state_of_another_parameter_is_refused(tmp_path: Path) -> None:
    """The shapes fit, and the names do not."""
    model, _ = two_layers("ab")
    one_step(tmp_path, model=model, optimizer=torch.optim.Adam([model["a"].weight]))  # type: ignore[index]
    optimizer = torch.optim.Adam([model["b"].weight])  # type: ignore[index]
    match = (
        r"of another parameter: optimizer.param_groups\[0\].params\[0\] \(here model.b.weight, there model.a.weight\)"
    )
    with pytest.raises(MismatchError, match=match):
        resumed(tmp_path, model=model, optimizer=optimizer)
    with pytest.warns(CheckpointerWarning, match="not loaded at all: optimizer"):
        resumed(tmp_path, strict=False, model=model, optimizer=optimizer)


def test_an_optimizer_with_one_state_for_all_parameters_is_refused_in_another_order(tmp_path: Path) -> None:
    """LBFGS keeps one long vector."""
    model, _ = two_layers("ab")
    one_step(tmp_path, model=model, optimizer=torch.optim.LBFGS([model[name].weight for name in "ab"]))  # type: ignore[index]
    optimizer = torch.optim.LBFGS([model[name].weight for name in "ba"])  # type: ignore[index]
    with pytest.raises(MismatchError, match="of another parameter"):
        resumed(tmp_path, model=model, optimizer=optimizer)


def test_a_state_without_names_is_taken_by_position(tmp_path: Path) -> None:
    """Parameters that are in no module, or that a checkpoint has no names of, are what they were."""
    weight = nn.Parameter(torch.ones(2))
    one_step(tmp_path, optimizer=torch.optim.Adam([weight, nn.Parameter(torch.ones(2))]))
    resumed(tmp_path, optimizer=torch.optim.Adam([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]))


def restarted(model: nn.Module) -> Any:
    """Return a momentum optimizer that has not taken a step."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def stepped(model: nn.Module, parameters: Any = None) -> Any:
    """Return a momentum optimizer after a step. The gradients of the parameters are 1, 2, ..."""
    optimizer = torch.optim.SGD(parameters or model.parameters(), lr=0.1, momentum=0.9)
    for number, parameter in enumerate(model.parameters(), start=1):
        parameter.grad = torch.full_like(parameter, number)
    optimizer.step()
    return optimizer


def momenta(optimizer: torch.optim.Optimizer) -> list[float]:
    """Return the momentum of each parameter, in the order of the groups."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [optimizer.state[parameter]["momentum_buffer"].flatten()[0].item() for parameter in parameters]


def test_names_of_a_wrapper_that_the_loop_was_not_given_do_not_matter(tmp_path: Path) -> None:
    """A program that names the parameters itself saves with DDP, and resumes without it."""
    wrapped, plain = nn.DataParallel(nn.Linear(2, 2)), nn.Linear(2, 2)
    one_step(tmp_path, optimizer=stepped(wrapped, list(wrapped.named_parameters())))
    optimizer = torch.optim.SGD(list(plain.named_parameters()), lr=0.1, momentum=0.9)
    resumed(tmp_path, optimizer=optimizer)
    assert [1, 2] == momenta(optimizer)


class Hiding(nn.Module):
    """A wrapper whose state has the names of the model within, as that of Lightning's Fabric."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.load_state_dict(*args, **kwargs)


def test_a_model_that_was_saved_within_a_wrapper_with_its_own_names_resumes_without_it(tmp_path: Path) -> None:
    """Its parameters have names that its state does not have."""
    model, plain = Hiding(nn.Linear(2, 2)), nn.Linear(2, 2)
    one_step(tmp_path, model=model, optimizer=stepped(model))
    optimizer = restarted(plain)
    resumed(tmp_path, model=plain, optimizer=optimizer)
    assert [1, 2] == momenta(optimizer)


def test_another_name_of_the_same_parameter_does_not_matter(tmp_path: Path) -> None:
    """The Loop is given a part of the model too, and each has a name for the parameters."""
    model, again = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
    one_step(tmp_path, model=model, optimizer=stepped(model))
    optimizer = restarted(again)
    with pytest.warns(CheckpointerWarning, match="only a part was loaded: missing: head$"):
        resumed(tmp_path, strict=False, model=again, head=again[0], optimizer=optimizer)
    assert [1, 2] == momenta(optimizer)


def test_parameters_with_one_name_are_refused_in_another_order(tmp_path: Path) -> None:
    """Two models that the Loop was not given may both have a weight."""
    one, other, last = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    models = nn.ModuleList([one, other, last])
    names = [("weight", one.weight), ("weight", other.weight), ("last", last.weight)]
    one_step(tmp_path, optimizer=stepped(models, names))
    same = torch.optim.SGD(names, lr=0.1, momentum=0.9)
    resumed(tmp_path, optimizer=same)
    assert [1, 2, 3] == momenta(same)
    with pytest.raises(MismatchError, match="of another parameter"):
        resumed(tmp_path, optimizer=torch.optim.SGD(names[::-1], lr=0.1, momentum=0.9))


class WithoutDuplicates(nn.Linear):
    """Has a method as it was before torch 2.0."""

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Any:  # type: ignore[override]
        return super().named_parameters(prefix, recurse)


def test_a_model_with_a_named_parameters_of_its_own_is_saved(tmp_path: Path) -> None:
    """It need not know the argument that keeps tied parameters."""
    model, again = WithoutDuplicates(2, 2), WithoutDuplicates(2, 2)
    one_step(tmp_path, model=model, optimizer=stepped(model))
    optimizer = restarted(again)
    resumed(tmp_path, model=again, optimizer=optimizer)
    assert [1, 2] == momenta(optimizer)


class Rebuilding(torch.optim.SGD):
    """Has an object in the state of each parameter, which it saves as a dict."""

    def state_dict(self) -> Any:
        found = super().state_dict()
        return {**found, "state": {key: {**one, "range": vars(one["range"])} for key, one in found["state"].items()}}

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["range"] = argparse.Namespace(**state["range"])


def test_what_an_optimizer_makes_of_its_saved_state_stays(tmp_path: Path) -> None:
    """Only what torch itself changes is put back."""
    first, second = (Rebuilding([nn.Parameter(torch.ones(1))], lr=0.1) for _ in range(2))
    first.state[first.param_groups[0]["params"][0]]["range"] = argparse.Namespace(low=1)
    one_step(tmp_path, optimizer=first)
    resumed(tmp_path, optimizer=second)
    assert [argparse.Namespace(low=1)] == [state["range"] for state in second.state.values()]


@pytest.mark.parametrize("seed", [1, [1, 2], None, np.arange(3), 1 << 2100])
def test_a_generator_of_numpy_spawns_what_it_would_have_spawned(tmp_path: Path, seed: Any) -> None:
    """Its `state` does not say how many it has spawned."""
    numbers = np.random.default_rng(seed)
    numbers.spawn(2)
    one_step(tmp_path, numbers=numbers)
    again = np.random.default_rng(seed)
    resumed(tmp_path, numbers=again)
    assert numbers.spawn(1)[0].spawn(1)[0].random() == again.spawn(1)[0].spawn(1)[0].random()
    assert numbers.random() == again.random()


def test_a_generator_without_a_saved_seed_keeps_its_own(tmp_path: Path) -> None:
    """Checkpoints of earlier versions have none."""
    numbers = np.random.default_rng(1)
    read, write = accessors(numbers) or (None, None)
    assert read is not None
    assert write is not None
    write({key: value for key, value in read().items() if key != "seed_seq"})
    assert np.random.default_rng(1).spawn(1)[0].random() == numbers.spawn(1)[0].random()


def test_a_model_without_memory_is_refused(tmp_path: Path) -> None:
    """A copy into a tensor on the meta device copies nothing."""
    one_step(tmp_path, model=nn.Linear(2, 1))
    model = nn.Linear(2, 1, device="meta")
    with pytest.raises(MismatchError, match=r"model.weight \(here \[1, 2\] on the meta device, there \[1, 2\]\)"):
        resumed(tmp_path, model=model)
    with pytest.raises(MismatchError, match=r"weight, bias on the meta device.*to_empty"):
        load_weights(model, tmp_path)
    with pytest.raises(MismatchError, match=r"weight, bias on the meta device.*to_empty"):
        load_weights(model, nn.Linear(2, 1).state_dict(), strict=False)
    resumed(tmp_path, model=model.to_empty(device="cpu"))


def test_a_model_that_is_saved_without_values_warns_at_the_first_save(tmp_path: Path) -> None:
    """The resume refuses them, which is late."""
    model = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1, device="meta")})
    with pytest.warns(CheckpointerWarning, match=r"model.b.weight, model.b.bias: on the meta device") as found:
        one_step(tmp_path, model=model)
    assert 1 == len(found)
    with pytest.raises(MismatchError, match=r"model.b.weight \(here \[1, 1\], there \[1, 1\] on the meta device\)"):
        resumed(tmp_path, model=nn.ModuleDict({name: nn.Linear(1, 1) for name in "ab"}))
    resumed(tmp_path, model=model)


def test_a_model_of_a_narrower_type_is_refused(tmp_path: Path) -> None:
    """torch itself would round the weights silently; a wider type holds them all."""
    one_step(tmp_path, model=nn.Linear(2, 1))
    with pytest.raises(MismatchError, match=r"model.weight \(here torch.bfloat16, there torch.float32\)"):
        resumed(tmp_path, model=nn.Linear(2, 1).to(torch.bfloat16))
    resumed(tmp_path, model=nn.Linear(2, 1).to(torch.float64))


def test_what_refuses_its_state_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    """Nothing is half loaded, whichever part refuses."""

    class Refusing:
        def state_dict(self) -> dict[str, Any]:
            return {"n": 1}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise KeyError("wanted")

    one_step(tmp_path, counters={"n": 5}, model=nn.Linear(1, 1), odd=Refusing())
    counters, model = {"n": 1}, nn.Linear(1, 1)
    before = model.weight.clone()
    with pytest.raises(MismatchError, match=r"odd refuses its state \(KeyError: 'wanted'\); nothing was loaded"):
        resumed(tmp_path, counters=counters, model=model, odd=Refusing())
    assert {"n": 1} == counters
    assert torch.equal(before, model.weight)


def test_what_a_safe_load_refuses_is_named_when_it_is_saved(tmp_path: Path) -> None:
    """Not at the resume, when it is too late."""
    with pytest.warns(CheckpointerWarning, match=r"state\['extra'\]\['where'\] is a pathlib"):
        one_step(tmp_path, extra={"where": Path()})


@pytest.mark.parametrize(
    ("thing", "match"),
    [
        (object(), "thing is a object, and nothing"),
        ([1], "thing is a list"),
        (nn.Linear, "thing is the class Linear; pass the object"),
    ],
)
def test_what_cannot_be_saved_is_an_error_at_once(thing: Any, match: str) -> None:
    """Silence would be noticed at the resume."""
    with pytest.raises(PolicyError, match=match):
        Loop(None, EVERY, thing=thing)


def test_the_loops_own_name_is_taken() -> None:
    """Else one would overwrite the other in the file."""
    with pytest.raises(PolicyError, match="an object is called 'loop'"):
        Loop(None, EVERY, loop=1)


def test_a_folder_of_shards_can_be_asked_for_in_one_process(tmp_path: Path) -> None:
    """It has all that a file has, and a resume is as exact."""
    unbroken = Small().train(None)

    def stop(where: str, step: int) -> None:
        if (where, step) == ("after", 5):
            raise KeyboardInterrupt

    options = {"format": "dcp"}
    with pytest.raises(KeyboardInterrupt):
        Small().train(tmp_path, tick=stop, options=options)
    assert "rescue-step=5.dcp" in [record.name for record in CheckpointManager(tmp_path).records]
    assert unbroken == Small().train(tmp_path, options=options)


def test_written_in_the_background_a_rescue_is_there_and_exact(tmp_path: Path) -> None:
    """The state is that of the boundary, whatever the training does while it is written."""
    unbroken = Small().train(None)

    def stop(where: str, step: int) -> None:
        if (where, step) == ("after", 5):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Small().train(tmp_path, tick=stop, options={"background": "wait"})
    assert "rescue-step=5.ckpt" in [record.name for record in CheckpointManager(tmp_path).records]
    assert unbroken == Small().train(tmp_path, options={"background": "wait"})


def test_a_resume_is_a_restore(tmp_path: Path) -> None:
    """The run goes on, and what lies beyond the step is abandoned."""
    small = Small()
    small.train(tmp_path, policy=EVERY)
    with Loop(tmp_path, EVERY, **small.objects) as loop:
        start = loop.resume(5)
        assert (0, 5, 5, "epoch=0-step=5.ckpt") == (start.epoch, start.step, start.batch, start.source)
        assert [1, 2, 3, 4, 5] == [record.step for record in loop.manager.records]
        for _ in loop.epochs(1):
            for batch in loop.batches(small.loader):
                loop.step({"loss": small.learn(batch)})
    steps = {record.name: record.step for record in loop.manager.records}
    assert [1, 2, 3, 4, 5, 6, 7] == list(steps.values())
    assert "epoch=0-step=6-v1.ckpt" in steps


def test_another_directory_starts_this_one_once(tmp_path: Path) -> None:
    """The same command line goes on after a preemption, and does not begin with the old weights again."""
    old, new = tmp_path / "old", tmp_path / "new"
    Small().train(old, policy=POLICY)
    best = next(record.name for record in CheckpointManager(old).records if "val" in record.metrics)
    for place in (old, old / best, str(old / "last.ckpt")):
        with Loop(tmp_path / "look", EVERY, **Small().objects) as loop:
            assert (loop.resume(place).step, Path(loop.progress.source).parent) in [(21, old), (7, old)]
    for steps in (22, 23):
        small = Small()
        with Loop(new, EVERY, **small.objects) as loop:
            source = loop.resume(old).source
            assert ("step=22" in source) == (steps == 23)
            for epoch in loop.epochs():
                for batch in loop.batches(small.loader, limit=steps - 21 if epoch == 3 else None):
                    loop.step({"loss": small.learn(batch)})
                if epoch == 3:
                    break
        assert steps == loop.progress.step
    with Loop(old, POLICY, **Small().objects) as loop:
        assert best == loop.resume(old / best).source
    with Loop(new, EVERY) as loop, pytest.raises(NotFoundError, match=r"no checkpoint 'nothing/there.ckpt'"):
        loop.resume("nothing/there.ckpt")


def test_what_no_loop_has_saved_is_not_resumed(tmp_path: Path) -> None:
    """It does not say how far the training was; its weights can be had otherwise."""
    with CheckpointManager(tmp_path, EVERY, state=lambda: {"w": 1}) as manager:
        manager.observe({}, 1, 0)
    with Loop(tmp_path, EVERY) as loop, pytest.raises(MismatchError, match=r"was not saved by a Loop.* load_weights"):
        loop.resume()


def test_weights_alone_lie_under_their_plain_names(tmp_path: Path) -> None:
    """A file of weights has plain names, in either format, so that other programs can load it."""
    policy = Policy(EverySteps(1), [KeepLast(1)], contents="weights")
    model = nn.Linear(2, 1)
    for format, read in (("torch", torch.load), ("safetensors", __import__("safetensors.torch").torch.load_file)):
        with pytest.warns(CheckpointerWarning, match="cannot resume"):
            loop = Loop(tmp_path / format, policy, options={"format": format}, model=model, seen=1)
        with loop:
            for _ in loop.epochs(1):
                for _ in loop.batches([0]):
                    loop.step()
        assert loop.last is not None
        assert ["bias", "weight"] == sorted(read(tmp_path / format / loop.last.name))


def test_the_loop_has_to_be_entered() -> None:
    """Without the block neither signals nor exceptions would be rescued, nor the directory closed."""
    loop = Loop(None, EVERY)
    with pytest.raises(ObservationError, match="with Loop"):
        next(loop.epochs(1))


def test_an_epoch_has_one_pass_and_reports_follow_steps() -> None:
    """A second one would move the place in the data."""
    with Loop(None, EVERY) as loop:
        for _ in loop.epochs(1):
            for _ in loop.batches([0, 1]):
                with pytest.raises(ObservationError, match=r"call step\(\) first, or pass val to step"):
                    loop.report({"val": 1.0})
                loop.step()
            with pytest.raises(ObservationError, match="had its batches already"):
                loop.batches([0])


def test_accumulated_gradients_count_their_batches(tmp_path: Path) -> None:
    """The place is that after the last whole update."""
    with Loop(tmp_path, EVERY) as loop:
        for _ in loop.epochs(1):
            for number in loop.batches(range(8)):
                if number % 3 == 2:
                    loop.step()
                if number == 7:
                    assert (2, 6) == (loop.progress.step, loop.progress.batch)
                    break
            break
    with Loop(tmp_path, EVERY) as loop:
        loop.resume()
        assert [6, 7] == [number for _ in loop.epochs(1) for number in loop.batches(range(8))]


def test_a_validation_within_the_epoch_is_ranked_at_its_step(tmp_path: Path) -> None:
    """A save that waited for the metric is made when it comes; one that is there is ranked anew."""
    with Loop(tmp_path, Policy(EverySteps(2), POLICY.keep[:1], name="{step}-{val}")) as loop:
        for _ in loop.epochs(1):
            for number in loop.batches(range(4)):
                loop.step({"loss": 1.0})
                if number % 2:
                    loop.report({"val": 3.0 - number})
    assert ["step=4-val=0.0.ckpt"] == [record.name for record in loop.manager.records]
    assert {"loss": 1.0, "val": 0.0} == dict(loop.manager.records[0].metrics)


def test_a_buffer_without_memory_that_is_not_saved_does_not_matter(tmp_path: Path) -> None:
    """The warning is about values that the checkpoints lack."""
    model = nn.Linear(1, 1)
    model.register_buffer("cache", torch.empty(3, device="meta"), persistent=False)
    one_step(tmp_path, model=model)
    resumed(tmp_path, model=model)


def test_a_tensor_without_memory_is_refused(tmp_path: Path) -> None:
    """A copy into it copies nothing, as for a model."""
    one_step(tmp_path, tensor=torch.ones(2))
    with pytest.raises(MismatchError, match=r"tensor.value \(here \[2\] on the meta device, there \[2\]\)"):
        resumed(tmp_path, tensor=torch.empty(2, device="meta"))
