"""What `attach` adds in a training of one process: rescues, a save at the end, and one rename."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointer_transformers import attach, last_valid_checkpoint
from hf_tiny import STEPS, At, Text, folders, make_trainer, quiet, records, same, weights_of
from safetensors.torch import load_file
from support.gated import GatedStorage
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from checkpointer import CheckpointerWarning, EveryEpochs, EverySteps, KeepBest, KeepLast, Policy
from checkpointer.errors import PolicyError

pytestmark = quiet

POLICY = Policy(EverySteps(4), [KeepLast(1)], last="link")


@pytest.fixture
def caught() -> Iterator[list[int]]:
    """Yield the signals that reach a handler of our own, which is there before the training."""
    numbers: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: numbers.append(number))
    yield numbers
    signal.signal(signal.SIGTERM, before)


def terminate() -> None:
    """Send this process a real signal."""
    os.kill(os.getpid(), signal.SIGTERM)


def scores_of(directory: Path) -> dict[str, tuple[str, Any]]:
    """Return the kind and the loss of each checkpoint."""
    return {name: (record.kind, record.metrics.get("eval_loss")) for name, record in records(directory).items()}


def test_a_signal_saves_at_the_step_stops_and_goes_on_to_who_had_it(tmp_path: Path, caught: list[int]) -> None:
    """The checkpoint is exact: a resume ends with the weights of an unbroken training."""
    unbroken = make_trainer(tmp_path / "unbroken", POLICY, attached=True)
    unbroken.train()
    trainer = make_trainer(tmp_path / "run", POLICY, attached=True, callbacks=[At(5, terminate)])
    trainer.train()
    assert [signal.SIGTERM] == caught
    assert 6 == trainer.state.global_step
    assert ("rescue", "rescue: signal 15") == (
        records(tmp_path / "run")["checkpoint-6"].kind,
        records(tmp_path / "run")["checkpoint-6"].reason,
    )
    assert "checkpoint-6" == os.readlink(tmp_path / "run/last")
    resumed = make_trainer(tmp_path / "run", POLICY, attached=True)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights_of(unbroken), weights_of(resumed))
    assert folders(tmp_path / "unbroken") == folders(tmp_path / "run")
    terminate()
    assert [signal.SIGTERM] * 2 == caught


def test_a_stopped_training_waits_for_the_mirror_no_longer_than_the_grace(tmp_path: Path, caught: list[int]) -> None:
    """A mirror that never answers would hold it for ten minutes."""
    mirror = GatedStorage()
    mirror.shut()
    options = {"mirror": mirror, "grace_s": 1.0}
    began = time.monotonic()
    trainer = make_trainer(tmp_path / "run", POLICY, attached=True, callbacks=[At(5, terminate)], options=options)
    with pytest.warns(CheckpointerWarning, match="the mirror memory is behind"):
        trainer.train()
    assert [signal.SIGTERM] == caught
    assert time.monotonic() - began < 300.0


def test_a_signal_at_a_step_that_is_due_needs_no_rescue(tmp_path: Path, caught: list[int]) -> None:
    """The policy's own checkpoint is enough, and at the end of an epoch nothing is written twice."""
    for step in (4, 5):
        directory = tmp_path / str(step)
        policy = Policy(EverySteps(4), [KeepLast(1)]) if step == 4 else Policy(EveryEpochs(1), [KeepLast(1)])
        make_trainer(directory, policy, attached=True, callbacks=[At(step - 1, terminate)]).train()
        assert {f"checkpoint-{step}": "regular" if step == 4 else "rescue"} == {
            name: record.kind for name, record in records(directory).items()
        }


class InEvaluation(TrainerCallback):
    """Does something after the second batch of the evaluation at a step, and counts the batches there."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.step, self.act, self.batches = step, act, 0

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.batches += 1
            if self.batches == 2:
                self.act()


LONG: Mapping[str, Any] = {"eval_dataset": Text(40, 400), "attached": True}
"""An evaluation of five batches, which draws a random number when it begins."""


@pytest.mark.parametrize(("strategy", "every"), [("steps", 4), ("steps", 5), ("epoch", 5)])
def test_a_signal_within_an_evaluation_ends_it_and_a_resume_runs_it_again(
    tmp_path: Path, caught: list[int], strategy: str, every: int
) -> None:
    """So the weights, and which checkpoints there are with which metrics, are those of an unbroken training."""
    policy = Policy(EverySteps(every), [KeepBest(2, "eval_loss", mode="min")], best="link")
    changes = {**LONG, "eval_strategy": strategy, "logging_steps": 3}
    unbroken = make_trainer(tmp_path / "unbroken", policy, **changes)
    unbroken.train()
    ends = InEvaluation(STEPS, terminate)
    make_trainer(tmp_path / "run", policy, callbacks=[ends], **changes).train()
    assert ([signal.SIGTERM], 2) == (caught, ends.batches)
    (rescued,) = records(tmp_path / "run").values()
    assert ("rescue", STEPS) == (rescued.kind, rescued.step)
    assert "eval_loss" not in rescued.metrics
    resumed = make_trainer(tmp_path / "run", policy, **changes)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights_of(unbroken), weights_of(resumed))
    assert scores_of(tmp_path / "unbroken") == scores_of(tmp_path / "run")
    assert folders(tmp_path / "unbroken") == folders(tmp_path / "run")


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
@pytest.mark.parametrize("within", [False, True])
def test_an_evaluation_that_a_signal_left_out_is_run_by_the_resume(
    tmp_path: Path, caught: list[int], strategy: str, within: bool
) -> None:
    """The checkpoint that was due at its step, and may be saved by then, is ranked as in an unbroken training."""
    policy = Policy(EverySteps(5), [KeepBest(1, "eval_loss", mode="min"), KeepLast(1)])
    changes: dict[str, Any] = {**LONG, "lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "loss"}
    changes |= {"greater_is_better": False, "eval_strategy": strategy, "logging_steps": 3}
    unbroken = make_trainer(tmp_path / "unbroken", policy, **changes)
    unbroken.train()
    ends = InEvaluation(STEPS, terminate) if within else At(STEPS - 1, terminate)
    make_trainer(tmp_path / "run", policy, callbacks=[ends], **changes).train()
    assert ["regular"] == [record.kind for record in records(tmp_path / "run").values()]
    resumed = make_trainer(tmp_path / "run", policy, **changes)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights_of(unbroken), weights_of(resumed))
    assert scores_of(tmp_path / "unbroken") == scores_of(tmp_path / "run")
    assert unbroken.state.best_metric == resumed.state.best_metric


def test_an_evaluation_of_other_weights_is_finished(tmp_path: Path, caught: list[int]) -> None:
    """An average of the weights, put in their place meanwhile, must not be saved as the weights."""

    class Averaging(Trainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> Any:
            before = weights_of(self)
            for weight in self.model.parameters():
                weight.data.mul_(0.5)
            metrics = super().evaluate(*args, **kwargs)
            self.model.load_state_dict(before)
            return metrics

    ends = InEvaluation(STEPS, terminate)
    trainer = make_trainer(tmp_path, POLICY, kind=Averaging, callbacks=[ends], **LONG)
    trainer.train()
    assert ([signal.SIGTERM], 5) == (caught, ends.batches)
    saved = load_file(tmp_path / f"checkpoint-{STEPS}/model.safetensors")
    assert all(torch.equal(tensor, weights_of(trainer)[name]) for name, tensor in saved.items())


@pytest.mark.parametrize("resumed", [False, True])
def test_a_signal_within_the_evaluation_on_start_ends_the_training_after_one_step(
    tmp_path: Path, caught: list[int], resumed: bool
) -> None:
    """What was resumed is still there to be resumed; a training that had not begun saves its first step."""
    if resumed:
        make_trainer(tmp_path, POLICY, max_steps=4, **LONG).train()
    ends = InEvaluation(4 if resumed else 0, terminate)
    trainer = make_trainer(tmp_path, POLICY, eval_on_start=True, callbacks=[ends], **LONG)
    trainer.train(resume_from_checkpoint=resumed)
    assert ([signal.SIGTERM], 2) == (caught, ends.batches)
    assert ["checkpoint-4" if resumed else "checkpoint-1"] == list(records(tmp_path))


def test_an_evaluation_outside_of_the_training_is_the_user_s(tmp_path: Path, caught: list[int]) -> None:
    """The signal does there what it did without us."""
    ends = InEvaluation(0, terminate)
    trainer = make_trainer(tmp_path, POLICY, callbacks=[ends], **LONG)
    assert "eval_loss" in trainer.evaluate()
    assert ([signal.SIGTERM], 5) == (caught, ends.batches)
    assert [] == list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("where", ["forward", "stepping", "save"])
def test_an_exception_goes_on_unchanged_and_leaves_a_rescue_if_the_state_is_one(tmp_path: Path, where: str) -> None:
    """Within the passes the weights are those of the last step; within the optimizer's step, of none."""

    class Breaks(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if where == "forward" and state.global_step == 6:
                raise ZeroDivisionError("the training breaks")

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if where == "stepping" and state.global_step == 6:
                raise ZeroDivisionError("the training breaks")

    trainer = make_trainer(tmp_path, POLICY, callbacks=[Breaks()])
    if where == "save":

        def full(path: str) -> None:
            raise OSError(28, "No space left on device")

        class Fills(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == 8:
                    state.save_to_json = full

        trainer.add_callback(Fills())
    attach(trainer)
    if where == "forward":
        with pytest.raises(ZeroDivisionError, match="the training breaks"):
            trainer.train()
        assert "rescue: ZeroDivisionError: the training breaks" == records(tmp_path)["checkpoint-6"].reason
        assert str(tmp_path / "checkpoint-6") == last_valid_checkpoint(tmp_path)
        return
    why = "the weights were changing" if where == "stepping" else "a save failed"
    failure = ZeroDivisionError if where == "stepping" else RuntimeError
    with pytest.raises(failure), pytest.warns(CheckpointerWarning, match=why):
        trainer.train()
    assert ["checkpoint-4"] == list(records(tmp_path))
    assert ["checkpoint-4", "last"] == folders(tmp_path)


def test_no_rescue_if_the_policy_wants_none_or_nothing_is_new(tmp_path: Path) -> None:
    """A step that is saved needs no second checkpoint."""
    for policy in (Policy(EverySteps(4), [KeepLast(1)], rescue=False), Policy(EverySteps(3), [KeepLast(1)])):
        directory = tmp_path / str(policy.rescue)
        trainer = make_trainer(directory, policy, attached=True, callbacks=[At(6, lambda: 1 // 0)])
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        assert ["regular"] == [record.kind for record in records(directory).values()]


def test_the_end_is_saved_however_late_it_is_decided_and_before_the_best_is_loaded(tmp_path: Path) -> None:
    """Early stopping speaks after the last event of an epoch; a policy that keeps the last has it all the same."""
    scores = {2: 0.9, 4: 0.5, 6: 0.4}
    policy = Policy(EverySteps(100), [KeepBest(1, "eval_score", mode="max"), KeepLast(1)], last="link")
    trainer = make_trainer(
        tmp_path,
        policy,
        scores=scores,
        eval_steps=2,
        metric_for_best_model="score",
        greater_is_better=True,
        callbacks=[At(3, lambda: None)],
    )
    trainer.args.load_best_model_at_end = True
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=1))
    attach(trainer)
    trainer.train()
    assert 4 == trainer.state.global_step
    assert "the training ends" in records(tmp_path)["checkpoint-4"].reason
    assert "checkpoint-4" == os.readlink(tmp_path / "last")


def test_attaching_twice_or_off_the_main_thread_is_said(tmp_path: Path) -> None:
    """Signals belong to the main thread; everything else works."""
    trainer = make_trainer(tmp_path, POLICY, attached=True)
    with pytest.raises(PolicyError, match="attached to its CheckpointCallback already"):
        attach(trainer)
    said: list[str] = []

    def train() -> None:
        with pytest.warns(CheckpointerWarning, match="main thread"):
            trainer.train()
        said.append("done")

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert ["done"] == said
    assert ["checkpoint-10", "last"] == folders(tmp_path)


def test_without_the_packages_the_import_names_the_extra() -> None:
    """Asked in an interpreter that cannot import one of the two."""
    code = (
        "import sys; from importlib.machinery import PathFinder as F; find = F.find_spec\n"
        "F.find_spec = classmethod(lambda c, n, *a, **k: None if n == sys.argv[1] else find(n, *a, **k))\n"
        "import checkpointer_transformers\n"
        "assert 'attach' in dir(checkpointer_transformers)\n"
        "try: checkpointer_transformers.CheckpointCallback\n"
        "except ImportError as error: print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": ":".join(path for path in sys.path if path)}
    for package in ("transformers", "accelerate"):
        done = subprocess.run(
            [sys.executable, "-c", code, package], capture_output=True, text=True, env=environment, check=True
        )
        assert f"needs {package}, which is not installed: pip install 'torch-checkpointer[transformers]'" in done.stdout
