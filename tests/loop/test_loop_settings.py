"""Settings are compared and never put back; what the training changes is; and a name means one thing."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from checkpointer_torch import Loop, read_config
from checkpointer_torch.sharded_state import KEY
from checkpointer_torch.training_state import TrainingState
from support.commands import command
from torch import nn

from checkpointer import (
    AnyOf,
    CheckpointerWarning,
    CheckpointManager,
    EveryCount,
    EverySteps,
    HMACKey,
    KeepAll,
    KeepLast,
    OnImprovement,
    Policy,
)
from checkpointer.distributed.ranks import OneRank
from checkpointer.errors import MismatchError, NotFoundError, PolicyError, UnknownValueError

EVERY = Policy(EverySteps(1), [KeepAll()])


@dataclasses.dataclass
class Arguments:
    """Settings, and a count among them."""

    epochs: int = 2
    lr: float = 0.1
    seen: int = 0


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Settings that nothing can be put back into."""

    lr: float = 0.1


def run(directory: Path | None, steps: int, **objects: Any) -> Loop:
    """Go on up to so many steps."""
    with Loop(directory, EVERY, **objects) as loop:
        loop.resume()
        for _ in loop.steps(steps):
            loop.step()
    return loop


# config=


@pytest.mark.parametrize("kind", [dict, lambda **named: argparse.Namespace(**named), Arguments])
def test_settings_are_compared_at_a_resume_and_never_put_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: Any
) -> None:
    """Asked for other epochs and another rate, the run has these, and each difference is logged by name."""
    run(tmp_path, 1, config=kind(epochs=2, lr=0.1))
    asked = kind(epochs=4, lr=0.01)
    loop = run(tmp_path, 2, config=asked)
    assert kind(epochs=4, lr=0.01) == asked
    assert loop.config is not None
    assert (4, 0.01) == (loop.config["epochs"], loop.config["lr"])
    logged = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [
        "config.epochs differs from epoch=0-step=1.ckpt: 4 here, 2 there; the setting given here holds",
        "config.lr differs from epoch=0-step=1.ckpt: 0.01 here, 0.1 there; the setting given here holds",
    ] == logged


def test_settings_that_are_not_given_again_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The next checkpoint would be without them."""
    run(tmp_path, 1, config={"lr": 0.1})
    run(tmp_path, 2)
    assert "this Loop was given no config=" in caplog.text


def test_settings_are_read_before_the_model_is_built(tmp_path: Path) -> None:
    """None in an empty directory; a checkpoint without settings, or one of another key, is an error."""
    assert read_config(tmp_path) is None
    key = HMACKey(b"0" * 32)
    run(tmp_path, 1, config={"width": 3, "net": {"depth": (1, 2)}}, options={"trust": key})
    run(tmp_path, 2, config={"width": 4, "net": {"depth": (1, 2)}}, options={"trust": key})
    assert {"width": 4, "net": {"depth": [1, 2]}} == read_config(tmp_path, options={"trust": key})
    assert {"width": 3, "net": {"depth": [1, 2]}} == read_config(tmp_path, 1, options={"trust": key})
    with pytest.raises(NotFoundError, match="has a signature that this key did not make"):
        read_config(tmp_path, 1, options={"trust": HMACKey(b"1" * 32)})
    run(tmp_path / "bare", 1, seen=0)
    with pytest.raises(NotFoundError, match="saved without settings"):
        read_config(tmp_path / "bare")
    with pytest.raises(PolicyError, match="did you mean 'trust'"):
        read_config(tmp_path, options={"trusts": key})


def test_settings_are_shown(tmp_path: Path) -> None:
    """By the command, before the other values."""
    run(tmp_path, 1, config={"net": {"width": 3}}, seen=0)
    text = command("show", tmp_path, "1").out
    assert 0 < text.index("config.net.width") < text.index("seen")


def test_a_damaged_checkpoint_gives_no_settings(tmp_path: Path) -> None:
    """Those of the newest valid one are read."""
    run(tmp_path, 2, config={"width": 3})
    damaged = tmp_path / "epoch=0-step=2.ckpt"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    with pytest.warns(CheckpointerWarning, match="restored epoch=0-step=1.ckpt"):
        assert {"width": 3} == read_config(tmp_path)


def test_a_setting_that_is_not_plain_data_is_text_or_refused() -> None:
    """Paths, classes and dtypes are text; a tensor is not a setting."""
    given = {"out": Path("runs"), "net": nn.Linear, "dtype": torch.float16, "rate": np.float64(0.5), "n": np.int64(3)}
    loop = run(None, 0, config=given)
    assert {
        "out": "runs",
        "net": "torch.nn.modules.linear.Linear",
        "dtype": "torch.float16",
        "rate": 0.5,
        "n": 3,
    } == loop.config
    with pytest.raises(PolicyError, match=r"config.net\[0\] is a Linear, which is not a setting"):
        Loop(None, EVERY, config={"net": [nn.Linear(1, 1)]})
    with pytest.raises(PolicyError, match="expected named settings"):
        Loop(None, EVERY, config=[1])


# Settings that are given as objects


@pytest.mark.parametrize("kind", [dict, lambda **named: argparse.Namespace(**named), Arguments])
def test_of_a_dict_the_run_changes_comes_back_and_settings_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: Any
) -> None:
    """A value that the run never changed and that is given otherwise now is a setting: it holds, and is logged."""
    first = kind(epochs=2, lr=0.1, seen=0)
    with Loop(tmp_path, EVERY, args=first) as loop:
        for step in loop.steps(2):
            vars_of(first)["seen"] = 10 * (step + 1)
            loop.step()
    second = kind(epochs=4, lr=0.01, seen=0)
    run(tmp_path, 3, args=second)
    assert {"epochs": 4, "lr": 0.01, "seen": 20} == vars_of(second)
    assert "args.lr differs from epoch=0-step=2.ckpt: 0.01 here, 0.1 there" in caplog.text
    third = kind(epochs=4, lr=0.01, seen=0)
    caplog.clear()
    run(tmp_path, 3, args=third)
    assert (20, "") == (vars_of(third)["seen"], caplog.text)


def test_nested_entries_new_ones_and_those_that_are_gone(tmp_path: Path) -> None:
    """A new setting stays; an entry that the run has removed stays away, and one that it added comes back."""
    first: dict[str, Any] = {"net": {"width": 2, "seen": 0}, "todo": 1}
    with Loop(tmp_path, EVERY, state=first) as loop:
        for _ in loop.steps(1):
            first["net"]["seen"] = 5
            first["added"] = torch.ones(1)
            del first["todo"]
            loop.step()
    second: dict[str, Any] = {"net": {"width": 3, "seen": 0, "new": True}, "todo": 1, "more": "x"}
    with Loop(tmp_path, EVERY, state=second) as loop:
        loop.resume()
    assert torch.equal(torch.ones(1), second.pop("added"))
    assert {"net": {"width": 3, "seen": 5, "new": True}, "more": "x"} == second


def test_going_back_in_the_same_process_puts_back_what_changed_since(tmp_path: Path) -> None:
    """What counts as a setting is what was given at the start, not what the training has made of it."""
    counters = {"seen": 0, "width": 2}
    with Loop(tmp_path, EVERY, counters=counters) as loop:
        for _ in loop.steps(3):
            loop.step()
            counters["seen"] += 1
        loop.resume(2)
    assert {"seen": 1, "width": 2} == counters


def test_a_large_dict_is_data_as_a_whole(tmp_path: Path) -> None:
    """No entry of it is taken for a setting."""
    run(tmp_path, 1, scores=dict.fromkeys(range(2000), 0.5))
    scores = dict.fromkeys(range(3000), 0.1)
    run(tmp_path, 2, scores=scores)
    assert dict.fromkeys(range(2000), 0.5) == scores


def test_a_plain_value_is_put_back_and_the_difference_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It may have been meant as a setting."""
    run(tmp_path, 1, lr=0.1)
    assert 0.1 == run(tmp_path, 2, lr=0.01)["lr"]
    assert "loop['lr'] is 0.1, as in epoch=0-step=1.ckpt, and not 0.01" in caplog.text


def test_a_schedule_that_replaces_the_one_given_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A training of 2 steps is continued to 4: torch goes on with the rate of the old end, which is 0."""

    def objects(length: int) -> dict[str, Any]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        short, long = (torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total) for total in (1, length))
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [short, long], [1])
        follows = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / length)
        return {"optimizer": optimizer, "schedule": schedule, "follows": follows}

    run(tmp_path, 2, **objects(2))
    with caplog.at_level(logging.WARNING, "checkpointer.torch"):
        run(tmp_path, 3, **objects(2))
    assert [] == caplog.messages
    with caplog.at_level(logging.WARNING, "checkpointer.torch"):
        run(tmp_path, 4, **objects(4))
    (message,) = caplog.messages
    assert message.startswith("schedule._schedulers[1].total_iters is 2, as in epoch=0-step=3.ckpt, and not 4")


def test_a_frozen_dataclass_is_refused_at_once() -> None:
    """Nothing can be put back into it."""
    with pytest.raises(PolicyError, match=r"args is a frozen Frozen.*config="):
        Loop(None, EVERY, args=Frozen())
    assert {"lr": 0.1} == run(None, 0, config=Frozen()).config


def vars_of(thing: Any) -> Any:
    """Return its entries, to look at and to change."""
    return thing if isinstance(thing, dict) else vars(thing)


# Names


@pytest.mark.parametrize("name", ["mirror", "background", "tolerate_failures", "format", "label", "trust"])
def test_an_option_of_the_manager_is_refused_as_an_object(tmp_path: Path, name: str) -> None:
    """It would be saved as state, and do nothing."""
    objects: dict[str, Any] = {name: True}
    with pytest.raises(PolicyError, match=rf"'{name}' is an option of CheckpointManager: pass options={{'{name}': "):
        Loop(tmp_path, EVERY, **objects)


def test_what_the_loop_sets_itself_is_neither_object_nor_option(tmp_path: Path) -> None:
    """An option that does not exist has the closest name in its error."""
    with pytest.raises(PolicyError, match="'weights' is an option of CheckpointManager: the Loop sets it itself"):
        Loop(tmp_path, EVERY, weights=torch.ones(2))
    with pytest.raises(PolicyError, match="'state' cannot be an option"):
        Loop(tmp_path, EVERY, options={"state": dict})
    with pytest.raises(PolicyError, match="no option 'miror'; did you mean 'mirror'"):
        Loop(tmp_path, EVERY, options={"miror": "x"})


def test_a_tensor_cannot_be_bound_anew_through_the_loop() -> None:
    """The error says what can be done instead."""
    tensor = torch.ones(2)
    with Loop(None, EVERY, X=tensor) as loop, pytest.raises(UnknownValueError, match="pass X=lambda: X to the Loop"):
        loop["X"] = torch.zeros(2)


def test_what_the_program_has_bound_anew_is_said_at_the_save(tmp_path: Path) -> None:
    """The object that was given is saved. One that is still in use is not reported, nor one that never was in use."""
    batch, stats, kept = torch.zeros(2), {"n": 0}, torch.zeros(2)
    with Loop(tmp_path, EVERY, batch=batch, stats=stats, kept=kept, noise=torch.ones(2)) as loop:
        batch, stats = torch.ones(2), {"n": 1}
        with pytest.warns(CheckpointerWarning, match="the Loop saves the object that it was given as") as caught:
            loop.step()
    assert {"batch", "stats"} == {str(warning.message).split("'")[1] for warning in caught}
    assert (2, 1, 0) == (float(batch.sum()), stats["n"], float(kept.sum()))


def test_a_function_is_read_at_each_save_and_read_back_by_its_name(tmp_path: Path) -> None:
    """Arrays and tuples come back as they were; a value that is not read back is said at the next save."""

    def train(steps: int, *, reads: bool = True) -> tuple[Any, ...]:
        carried: tuple[Any, ...] = (torch.zeros(2), np.zeros(2, dtype=np.float32), 0, [np.float64(0.5)])
        with Loop(tmp_path, EVERY, carried=lambda: carried) as loop:
            loop.resume()
            carried = loop["carried"] if reads else carried
            for _ in loop.steps(steps):
                carried = (carried[0] + 1, carried[1] + 1, carried[2] + 1, carried[3])
                loop.step()
        return carried

    train(2)
    tensor, array, count, values = train(4)
    assert torch.equal(torch.full((2,), 4.0), tensor)
    assert (np.float32, [4.0, 4.0], 4, [0.5]) == (array.dtype, array.tolist(), count, values)
    with pytest.warns(CheckpointerWarning, match=r"Read loop\['carried'\] after resume\(\)"):
        train(5, reads=False)


@attrs.frozen
class TwoRanks(OneRank):
    """One of two processes; the other one's state is what it was handed."""

    rank: int
    size: int = 2
    other: Any = None

    def gather(self, value: Any) -> list[Any]:
        """Return both."""
        return [self.other, value] if self.rank else [value, self.other]


def test_on_several_processes_each_has_its_own_value() -> None:
    """What is carried from batch to batch belongs to the batches that a process has."""
    (own,) = TrainingState({"h": lambda: "of rank 1"}, OneRank()).take()[KEY]["ranks"]
    state = TrainingState({"h": lambda: "of rank 0"}, TwoRanks(0, other=own)).take()
    for rank in (0, 1):
        training = TrainingState({"h": lambda: ""}, TwoRanks(rank))
        training.put(state, "it", strict=True)
        assert f"of rank {rank}" == training.objects["h"]


def test_a_function_with_arguments_is_refused_at_once() -> None:
    """It could not be called at a save."""
    with pytest.raises(PolicyError, match="X is a function that needs arguments"):
        Loop(None, EVERY, X=lambda x: x)


def test_a_tensor_of_before_may_be_a_function_now(tmp_path: Path) -> None:
    """A program that follows the advice goes on with the checkpoints it has."""
    batch = torch.ones(2)
    run(tmp_path, 1, batch=batch)
    with Loop(tmp_path, EVERY, batch=lambda: None) as loop:
        loop.resume()
        assert torch.equal(batch, loop["batch"])


def test_what_is_saved_is_said_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    """In one line of the log, and by print."""
    caplog.set_level(logging.INFO, "checkpointer.torch")
    tensor = torch.ones(1)
    objects: dict[str, Any] = {"net": nn.Linear(1, 1), "X": tensor, "h": lambda: tensor, "seen": 0}
    with Loop(None, EVERY, config={"lr": 1}, **objects) as loop:
        pass
    plan = (
        "net (Linear), X (Tensor, as written in place), h (a function's value at each save), "
        "seen (int, as loop['seen']), config, random states"
    )
    assert f"saved by this loop: {plan}" in caplog.text
    assert plan in repr(loop)


# Another program's own file


def test_a_training_goes_on_from_another_programs_file(tmp_path: Path) -> None:
    """With its optimizer and counts, and under the names that DDP gave; afterwards the directory has its own."""
    old, optimizer = make_pair()
    with torch.no_grad():
        old.weight.fill_(7)
    optimizer.step()
    state = {f"module.{name}": value for name, value in old.state_dict().items()}
    content = {"state_dict": state, "opt": {"sgd": optimizer.state_dict()}, "epoch": torch.tensor(3), "best": 0.5}
    torch.save(content, tmp_path / "old.pt")
    names: dict[str, Any] = {
        "model": "state_dict",
        "optimizer": "opt.sgd",
        "epoch": "epoch",
        "step": lambda old: int(old["epoch"]) * 100,
        "best": "best",
    }
    for steps in (301, 302):
        model, optimizer = make_pair()
        with Loop(tmp_path / "run", EVERY, model=model, optimizer=optimizer, best=0.0) as loop:
            progress = loop.resume(tmp_path / "old.pt", map=names)
            assert (3, steps - 1, 0.5) == (progress.epoch, progress.step, loop["best"])
            assert 7.0 == float(model.weight[0, 0].detach())
            for _ in loop.steps(steps):
                loop.step()


def test_a_map_that_does_not_fit_loads_nothing(tmp_path: Path) -> None:
    """Whether a key is not in the file, an object is not in the map, or the file does not exist."""
    model, optimizer = make_pair()
    torch.save({"state_dict": model.state_dict(), "epoch": -1}, tmp_path / "old.pt")
    with Loop(tmp_path / "run", EVERY, model=model, optimizer=optimizer) as loop:
        with pytest.raises(MismatchError, match=r"no 'optimizer' \(have: state_dict, epoch\)"):
            loop.resume(tmp_path / "old.pt", map={"model": "state_dict", "optimizer": "optimizer"})
        with pytest.raises(MismatchError, match=r"missing: optimizer\. In map= give each of model, optimizer the key"):
            loop.resume(tmp_path / "old.pt", map={"model": "state_dict"})
        with pytest.raises(PolicyError, match=r"map=\{'step': 300\}: expected a key .* such as lambda _: 300"):
            loop.resume(tmp_path / "old.pt", map={"model": "state_dict", "step": 300})  # type: ignore[dict-item]
        with pytest.raises(PolicyError, match=r"the epoch that map= finds .* is -1"):
            loop.resume(tmp_path / "old.pt", map={"model": "state_dict", "epoch": "epoch"})
        with pytest.raises(PolicyError, match="'best' is not its path"):
            loop.resume("best", map={"model": "state_dict"})
        with pytest.raises(MismatchError, match=r"was not saved by a Loop.*map="):
            loop.resume(tmp_path / "old.pt")
        with pytest.warns(CheckpointerWarning, match="missing: optimizer"):
            loop.resume(tmp_path / "old.pt", map={"model": "state_dict", "step": lambda _: 5}, strict=False)
    assert 5 == loop.progress.step


def test_a_path_that_is_not_there_is_said_as_such(tmp_path: Path) -> None:
    """Nothing is made at it."""
    with Loop(tmp_path / "run", Policy(EverySteps(1), [KeepLast(1)]), seen=0) as loop:
        for path in (str(tmp_path / "gone" / "old.pt"), "old.pt"):
            with pytest.raises(NotFoundError, match=r"has no checkpoint; and /.*old.pt is neither a file nor"):
                loop.resume(path)
        with pytest.raises(NotFoundError, match=r"old.pt is not there"):
            loop.resume(tmp_path / "gone" / "old.pt")
    assert not (tmp_path / "gone").exists()


def make_pair() -> tuple[nn.Linear, torch.optim.SGD]:
    """Return a model and its optimizer, with momentum."""
    model = nn.Linear(1, 1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model, torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)


def test_a_policy_may_look_at_what_the_steps_report(tmp_path: Path) -> None:
    """A count and an improvement make a step of a Loop due; so does the end of the training."""
    policy = Policy(AnyOf(EveryCount("tokens", 100), OnImprovement("loss", mode="min")), [KeepAll()])
    losses = [3.0, 4.0, 5.0, 2.0, 3.0, 3.0]
    with Loop(tmp_path, policy) as loop:
        for at in loop.steps(6):
            loop.step({"tokens": 40.0 * (at + 1), "loss": losses[at]})
    with CheckpointManager(tmp_path) as manager:
        assert [1, 3, 4, 5, 6] == [record.step for record in manager.records]
