"""A value that the training changes and that no state_dict holds is named at a save."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointer_torch import Loop
from torch import nn

from checkpointer import CheckpointerWarning, EverySteps, KeepLast, Policy

POLICY = Policy(EverySteps(1), [KeepLast(1)])


class Annealed(nn.Module):
    """A part of a model with what is often forgotten: a number, a text and a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.tau = 1.0
        self.phase = "warm"
        self.mean = torch.zeros(2)
        self.width = 2
        self.last: torch.Tensor | None = None
        self.seen: torch.Tensor
        self.register_buffer("seen", torch.tensor(0))
        self._private = 0

    def forward(self, inputs: torch.Tensor) -> Any:
        self.last = inputs
        return self.layer(inputs) / self.tau


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Annealed()

    def forward(self, inputs: torch.Tensor) -> Any:
        return self.body(inputs)


class Counter:
    """An object that saves its count under another name, and forgets its mode."""

    def __init__(self) -> None:
        self.count = 0
        self.mode = False

    def state_dict(self) -> dict[str, Any]:
        return {"n": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["n"]


class Patient:
    """A scheduler around one of torch, which saves a part of its state, as timm's PlateauLRScheduler does."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.inner = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=2)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.inner.best, "last_epoch": self.inner.last_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self.inner).update(state)


class Sharp(torch.optim.Optimizer):
    """An optimizer that steps with another one and saves its own states only, as many a SAM does."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.base = torch.optim.SGD(self.param_groups, lr=0.1, momentum=0.9)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base.step()


def said(directory: Path, steps: int = 1, *, change: Any, **objects: Any) -> list[str]:
    """Return the warnings of a training in which ``change`` is called at each step."""
    with warnings.catch_warnings(record=True) as caught, Loop(directory, POLICY, **objects) as loop:
        warnings.simplefilter("always")
        loop.resume()
        for step in loop.steps(steps):
            change(step)
            loop.step()
    return [str(one.message) for one in caught if issubclass(one.category, CheckpointerWarning)]


@pytest.mark.parametrize(
    ("attribute", "value", "text"),
    [
        ("tau", 0.5, "model.body.tau (1.0 -> 0.5)"),
        ("tau", torch.tensor(0.5), "model.body.tau (1.0 -> 0.5)"),
        ("tau", 2, "model.body.tau (1.0 -> 2)"),
        ("phase", "cool", "model.body.phase ('warm' -> 'cool')"),
        ("mean", torch.ones(2), "model.body.mean (a tensor, not a buffer)"),
    ],
)
def test_an_attribute_of_a_module_that_changes_and_is_not_saved_is_named_once(
    tmp_path: Path, attribute: str, value: Any, text: str
) -> None:
    """The message says which, from what to what, and three ways to save it. A number times a tensor is a tensor."""
    model = Model()
    (message,) = said(tmp_path, 3, change=lambda step: setattr(model.body, attribute, value), model=model)
    assert text in message
    assert f"pass {attribute}=lambda: model.body.{attribute} to the Loop" in message


def test_a_tensor_that_is_written_in_place_is_named(tmp_path: Path) -> None:
    """It is the same object as before."""
    model = Model()
    (message,) = said(tmp_path, change=lambda step: model.body.mean.add_(1), model=model)
    assert "model.body.mean" in message


def test_what_is_constant_saved_private_or_made_by_the_forward_pass_is_not_named(tmp_path: Path) -> None:
    """A buffer, the training mode, the activations of the last batch, and the settings of torch's own layers."""
    model = Model()

    def change(step: int) -> None:
        model.eval()
        model(torch.ones(1, 2))
        model.body.seen += 1
        model.body._private = step

    assert said(tmp_path, 2, change=change, model=model) == []


def test_a_number_that_is_saved_under_another_name_is_not_named(tmp_path: Path) -> None:
    """The mode is, because nothing in the state has that name."""
    counter = Counter()
    counter.count = 6

    def change(step: int) -> None:
        counter.count += 1

    assert said(tmp_path, change=change, counter=counter) == []
    (message,) = said(tmp_path, 3, change=lambda step: setattr(counter, "mode", True), counter=counter)
    assert "counter.mode (False -> True)" in message


def test_a_count_of_an_object_within_that_is_not_saved_is_named(tmp_path: Path) -> None:
    """The wrapper saves the best metric. The number of bad epochs begins again at a resume."""
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = Patient(optimizer)
    (message,) = said(
        tmp_path, 3, change=lambda step: scheduler.inner.step(float(step > 0)), optimizer=optimizer, scheduler=scheduler
    )
    assert "scheduler.inner.num_bad_epochs (0 -> " in message


def test_the_states_of_an_optimizer_within_that_are_not_saved_are_named(tmp_path: Path) -> None:
    """Its momentum begins with zeros at a resume. If the optimizer is given too, its states are saved."""
    model = nn.Linear(1, 1)

    def train(optimizer: Sharp) -> Any:
        def step(number: int) -> None:
            model(torch.ones(1, 1)).sum().backward()
            optimizer.step()

        return step

    sharp = Sharp(model.parameters())
    (message,) = said(tmp_path / "lost", 2, change=train(sharp), model=model, optimizer=sharp)
    assert "optimizer.base (the states of an optimizer)" in message
    sharp = Sharp(model.parameters())
    assert [] == said(tmp_path / "given", 2, change=train(sharp), model=model, base=sharp.base, optimizer=sharp)


def test_what_a_resume_puts_back_is_no_change(tmp_path: Path) -> None:
    """An object may set an attribute when it loads its state."""
    counter = Counter()

    def count(step: int) -> None:
        counter.count += 1

    said(tmp_path, 2, change=count, counter=counter)
    counter = Counter()
    assert said(tmp_path, 4, change=count, counter=counter) == []
    assert counter.count == 4


def test_the_advice_gives_an_exact_resume(tmp_path: Path) -> None:
    """A function reads the value at each save, and the program sets it after resume()."""

    def taus(steps: int) -> Iterator[float]:
        model = Model()
        with Loop(tmp_path, POLICY, model=model, tau=lambda: model.body.tau) as loop:
            loop.resume()
            model.body.tau = loop["tau"]
            for _ in loop.steps(steps):
                model.body.tau *= 0.5
                yield model.body.tau
                loop.step()

    assert [0.5, 0.25] == list(taus(2))
    assert [0.125] == list(taus(3))


class Shadow:
    """An average of the weights, without a state_dict, as many programs write it by hand."""

    def __init__(self) -> None:
        self.shadow: dict[str, torch.Tensor] = {}
        self.last: dict[str, torch.Tensor] = {}
        self.steps = 0

    def update(self, model: nn.Module, *, in_place: bool = False) -> None:
        for name, parameter in model.named_parameters():
            now = parameter.detach()
            if in_place and name in self.shadow:
                self.shadow[name].lerp_(now, 0.1)
            else:
                self.shadow[name] = 0.9 * self.shadow.get(name, now) + 0.1 * now
        self.last["activations"] = torch.ones(2, 3)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_a_dict_with_a_tensor_for_each_parameter_is_named(tmp_path: Path, in_place: bool, begun: bool) -> None:
    """In the module or in an object that it holds. A dict of activations is not: each step makes it anew."""
    model = Model()
    model.body.average = Shadow()  # type: ignore[assignment]
    average: Any = model.body.average
    if begun:
        average.update(model.body)
    (warning,) = said(tmp_path, 3, change=lambda _: average.update(model.body, in_place=in_place), model=model)
    assert "has changed model.body.average.shadow (a dict with tensors of the parameters), and no state" in warning
    assert "or pass shadow=lambda: model.body.average.shadow to the Loop and set" in warning


def test_the_advice_for_such_a_dict_gives_it_back(tmp_path: Path) -> None:
    """A function's value is saved at each save."""
    model = Model()
    average = Shadow()
    model.body.average = average  # type: ignore[assignment]
    given: dict[str, Any] = {"shadow": lambda: average.shadow}
    assert [] == said(tmp_path, 2, change=lambda _: average.update(model.body), model=model, **given)
    expected, average.shadow = average.shadow, {}
    with Loop(tmp_path, POLICY, model=model, **given) as loop:
        loop.resume()
        average.shadow = loop["shadow"]
    assert expected.keys() == average.shadow.keys()
    assert all(value.equal(average.shadow[key]) for key, value in expected.items())


def test_the_importances_of_adalora_are_named(tmp_path: Path) -> None:
    """Its allocator is a plain object, and its dicts are empty when the training begins."""
    peft = pytest.importorskip("peft")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config: dict[str, Any] = {"model_type": "custom"}
            self.layer = nn.Linear(4, 4)

        def forward(self, inputs: torch.Tensor) -> Any:
            return self.layer(inputs)

    config = peft.AdaLoraConfig(target_modules=["layer"], total_step=20, tinit=2, tfinal=2)
    model = peft.get_peft_model(Net(), config)

    def train(step: int) -> None:
        model.zero_grad()
        model.base_model.model(torch.ones(1, 4)).sum().backward()
        model.base_model.update_and_allocate(step)

    warnings = said(tmp_path, 3, change=train, model=model)
    (warning,) = [text for text in warnings if "no state_dict() holds it" in text]
    assert all(f"model.base_model.rankallocator.{name} (a dict" in warning for name in ("ipt", "exp_avg_ipt"))


def test_a_tensor_of_inference_mode_is_no_error(tmp_path: Path) -> None:
    """Torch does not count how often it is written; a new one is noticed."""
    model = Model()
    body: Any = model.body
    with torch.inference_mode():
        body.mean = torch.ones(2)
        body.means = {"layer.bias": torch.ones(1)}
    assert [] == said(tmp_path / "same", 2, change=lambda _: None, model=model)
    (warning,) = said(tmp_path / "other", 2, change=lambda _: setattr(body, "mean", torch.zeros(2)), model=model)
    assert "model.body.mean (a tensor, not a buffer)" in warning


def test_a_number_that_stays_nan_has_not_changed(tmp_path: Path) -> None:
    """NaN is not equal to itself."""
    model = Model()
    model.body.best = math.nan  # type: ignore[assignment]
    assert [] == said(tmp_path / "same", 2, change=lambda _: None, model=model)
    (warning,) = said(tmp_path / "other", 2, change=lambda _: setattr(model.body, "best", 1.0), model=model)
    assert "model.body.best (nan -> 1.0)" in warning


def test_a_number_that_becomes_a_tensor_without_memory_is_no_error(tmp_path: Path) -> None:
    """Such a tensor has no number to compare."""
    model = Model()
    model.body.best = 1.0  # type: ignore[assignment]
    assert [] == said(
        tmp_path, 2, change=lambda _: setattr(model.body, "best", torch.ones((), device="meta")), model=model
    )
