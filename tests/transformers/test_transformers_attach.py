"""What `attach` adds in a training of one process: rescues, a save at the end, and one rename."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpointer_transformers import attach, last_valid_checkpoint
from hf_tiny import At, folders, make_trainer, quiet, records, same, weights_of
from support.gated import GatedStorage
from transformers import EarlyStoppingCallback, TrainerCallback

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
    assert "checkpoint-4" == os.readlink(tmp_path / "run/last")
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
    words = "the weights were changing" if where == "stepping" else "it was a save that failed"
    failure = ZeroDivisionError if where == "stepping" else RuntimeError
    with pytest.raises(failure), pytest.warns(CheckpointerWarning, match=words):
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
