"""The callback in real trainings: when it saves, what stays, what is measured, and what the Trainer says of it."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointer_transformers import CheckpointCallback, attach, last_valid_checkpoint
from checkpointer_transformers.lock import Claim
from hf_tiny import STEPS, At, Text, folders, make_trainer, quiet, records, same, weights_of
from support.half import half
from support.schedule_free import ScheduleFree
from transformers import TrainerCallback

from checkpointer import (
    AnyOf,
    CheckpointerWarning,
    CheckpointManager,
    EveryEpochs,
    EverySeconds,
    EverySteps,
    KeepBest,
    KeepEvery,
    KeepLast,
    Policy,
    Progress,
    When,
)
from checkpointer.errors import NoValidCheckpointError, PolicyError, SaveError
from checkpointer.storage import open_storage
from checkpointer.storage.owner import new_owner, release
from checkpointer.testing import FakeClock

pytestmark = quiet

EACH = Policy(EverySteps(1), [KeepLast(20)])
BEST = KeepBest(1, "eval_score", mode="max")


def state_of(folder: Path) -> dict[str, Any]:
    """Return what the Trainer's own account in a checkpoint says."""
    found: dict[str, Any] = json.loads((folder / "trainer_state.json").read_text())
    return found


class Breaks(At):
    """Breaks the training off as a kill would, but for the process."""

    def __init__(self, step: int) -> None:
        super().__init__(step, self.fail)

    def fail(self) -> None:
        raise ZeroDivisionError("the training breaks")


def test_the_constructor_has_types_and_not_their_names() -> None:
    """Tools that build parsers ask the signature."""
    parameters = inspect.signature(CheckpointCallback).parameters.values()
    assert [] == [part.name for part in parameters if isinstance(part.annotation, str)]


@pytest.mark.parametrize("attached", [False, True])
def test_an_optimizer_of_which_other_ranks_hold_parts_is_refused_by_name(tmp_path: Path, attached: bool) -> None:
    """With tensor parallelism the Trainer writes the part of rank 0, and this would count as a checkpoint."""
    trainer: Any = None
    spread = At(1, lambda: trainer.optimizer.param_groups[0]["params"].append(half()))
    policy = Policy(EverySteps(2), [KeepLast(2)], rescue=False)
    trainer = make_trainer(tmp_path, policy, callbacks=[spread], attached=attached)
    with pytest.raises(
        SaveError, match=r"optimizer.pt: optimizer.param_groups\[0\]\['params'\]\[\d+\] is a torch.*DTensor"
    ):
        trainer.train()
    assert not records(tmp_path)


# When


@pytest.mark.parametrize(
    ("when", "steps"),
    [
        (EverySteps(4), [4, 8, 10]),
        (EveryEpochs(1), [5, 10]),
        (AnyOf(EveryEpochs(1), EverySteps(3)), [3, 5, 6, 9, 10]),
    ],
)
@pytest.mark.parametrize("attached", [False, True])
def test_it_saves_when_the_policy_says(tmp_path: Path, when: Any, steps: list[int], attached: bool) -> None:
    """And at the end of the training, as a rule keeps it."""
    make_trainer(tmp_path, Policy(when, [KeepLast(20)]), attached=attached).train()
    assert [f"checkpoint-{step}" for step in steps] == sorted(folders(tmp_path), key=lambda name: int(name[11:]))
    found = records(tmp_path)
    assert {f"checkpoint-{step}": step for step in steps} == {name: record.step for name, record in found.items()}
    assert {step: (step - 1) // STEPS for step in steps} == {record.step: record.epoch for record in found.values()}
    assert {step: step in (5, 10) for step in steps} == {record.step: record.epoch_end for record in found.values()}


def test_a_function_of_the_report_may_make_it_due(tmp_path: Path) -> None:
    """The Trainer's steps and epochs are asked about, and the end of the training is due too."""

    def fibonacci(now: Progress) -> bool:
        return now.step in (1, 2, 3, 5, 8)

    make_trainer(tmp_path, Policy(When(fibonacci), [KeepLast(20)])).train()
    assert [1, 2, 3, 5, 8, 10] == sorted(record.step for record in records(tmp_path).values())


def test_time_counts_on_the_manager_s_clock(tmp_path: Path) -> None:
    """A save is due once the interval has passed, at the step that is then done."""
    clock = FakeClock(1000.0)
    ticking = At(-1, lambda: None)
    ticking.on_step_begin = lambda *args, **kwargs: clock.advance(10.0)  # type: ignore[method-assign]
    policy = Policy(EverySeconds(25), [KeepEvery(steps=1)])
    make_trainer(tmp_path, policy, callbacks=[ticking], options={"clock": clock}).train()
    assert ["checkpoint-10", "checkpoint-3", "checkpoint-6", "checkpoint-9"] == folders(tmp_path)


def test_a_save_that_another_callback_asks_for_is_the_policy_s_to_decide(tmp_path: Path) -> None:
    """The policy decides on one that comes before ours; what no rule keeps is not written."""

    class Asks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_save = state.global_step in (2, 7)

    for keep, saved in ((KeepLast(20), [10, 2, 7]), (KeepEvery(steps=10), [10])):
        trainer = make_trainer(tmp_path / str(len(saved)), None, callbacks=[Asks()])
        trainer.add_callback(CheckpointCallback(Policy(EverySteps(100), [keep])))
        trainer.train()
        assert [f"checkpoint-{step}" for step in saved] == folders(tmp_path / str(len(saved)))
    assert "another callback asked" in records(tmp_path / "3")["checkpoint-2"].reason


def test_what_a_later_callback_lets_the_trainer_write_is_adopted_or_warned_of(tmp_path: Path) -> None:
    """The Trainer has written before the callback is called."""

    class Asks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_save = control.should_save or state.global_step == 2

    make_trainer(tmp_path / "kept", Policy(EverySteps(100), [KeepLast(20)]), callbacks=[Asks()]).train()
    assert ["checkpoint-10", "checkpoint-2"] == sorted(records(tmp_path / "kept"))
    with pytest.warns(CheckpointerWarning, match="checkpoint-2 was written because another callback"):
        make_trainer(tmp_path / "not", Policy(EverySteps(100), [KeepEvery(steps=10)]), callbacks=[Asks()]).train()
    assert ["checkpoint-10"] == sorted(records(tmp_path / "not"))
    assert ["checkpoint-10", "checkpoint-2"] == folders(tmp_path / "not")
    make_trainer(
        tmp_path / "held", Policy(EverySteps(100), [KeepEvery(steps=10)]), callbacks=[Asks()], attached=True
    ).train()
    assert ["checkpoint-10"] == folders(tmp_path / "held")


# What is measured


def test_metrics_belong_to_the_step_they_were_measured_at(tmp_path: Path) -> None:
    """Training loss every second step, evaluation every fifth; what was measured before is not repeated."""
    scores = {5: 0.5, 10: 0.25}
    make_trainer(tmp_path, EACH, scores=scores, logging_steps=2).train()
    found = records(tmp_path)
    assert {2, 4, 6, 8, 10} == {record.step for record in found.values() if "loss" in record.metrics}
    assert scores == {r.step: r.metrics["eval_score"] for r in found.values() if "eval_score" in r.metrics}
    assert all("train_runtime" not in record.metrics for record in found.values())
    logged = {
        line["step"]: line["loss"] for line in state_of(tmp_path / "checkpoint-10")["log_history"] if "loss" in line
    }
    assert logged == {r.step: r.metrics["loss"] for r in found.values() if "loss" in r.metrics}


def test_each_of_several_evaluation_sets_counts(tmp_path: Path) -> None:
    """Two rules, each ranking by another set; the first set's metrics come before the second's."""
    sets = {"one": Text(8, 400), "two": Text(8, 500)}
    policy = Policy(EverySteps(5), [KeepBest(1, "eval_one_loss", mode="min"), KeepBest(1, "eval_two_loss", mode="max")])
    make_trainer(tmp_path, policy, eval_dataset=sets).train()
    for record in records(tmp_path).values():
        assert {"eval_one_loss", "eval_two_loss"} <= record.metrics.keys()
    assert ["checkpoint-10", "checkpoint-5"] == folders(tmp_path)


def test_an_evaluation_after_the_save_ranks_it(tmp_path: Path) -> None:
    """Saved by the step, evaluated at the end of the epoch: the same step, and one checkpoint."""
    policy = Policy(EverySteps(5), [BEST, KeepLast(1)], best="link")
    trainer = make_trainer(tmp_path, policy, scores={5: 0.9, 10: 0.1}, eval_strategy="epoch")
    trainer.train()
    assert {5: 0.9, 10: 0.1} == {record.step: record.metrics["eval_score"] for record in records(tmp_path).values()}
    assert "checkpoint-5" == os.readlink(tmp_path / "best")
    assert (0.9, 5) == (trainer.state.best_metric, trainer.state.best_global_step)


class Means(TrainerCallback):
    """Logs another loss at the end of each epoch, as people do with its mean; may evaluate once more."""

    def __init__(self, *, evaluates: bool = False) -> None:
        self.evaluates = evaluates
        self.trainer: Any = None

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.log({"loss": 0.0 if state.global_step == STEPS else 99.0})
        control.should_evaluate = self.evaluates


def test_what_is_logged_of_a_saved_step_later_does_not_rank_it_anew(tmp_path: Path) -> None:
    """The mean of an epoch under the name of the loss that the step was ranked by."""
    means = Means()
    policy = Policy(EverySteps(STEPS), [KeepBest(1, "loss", mode="min")])
    means.trainer = trainer = make_trainer(tmp_path, policy, callbacks=[means], attached=True)
    trainer.train()
    logged: dict[int, float] = {}
    for log in trainer.state.log_history:
        logged.setdefault(log["step"], log.get("loss", 0.0))
    best = min(logged, key=logged.__getitem__)
    assert {best: logged[best]} == {record.step: record.metrics["loss"] for record in records(tmp_path).values()}


def test_another_evaluation_of_a_saved_step_ranks_it_anew(tmp_path: Path) -> None:
    """What it measures takes the place of what the first has measured."""

    class Rising(dict[int, float]):
        def __getitem__(self, step: int) -> float:
            self[step] = 1.0 + self.get(step, 0.0)
            return self.get(step, 0.0)

    means = Means(evaluates=True)
    each = Policy(EverySteps(STEPS), [KeepLast(9)])
    means.trainer = trainer = make_trainer(tmp_path, each, callbacks=[means], scores=Rising({0: 0.0}), attached=True)
    trainer.train()
    assert [2.0, 2.0] == [record.metrics["eval_score"] for record in records(tmp_path).values()]


def test_a_due_point_waits_for_its_metric(tmp_path: Path) -> None:
    """Due at step 4, evaluated at 5: the checkpoint is that of step 5."""
    make_trainer(tmp_path, Policy(EverySteps(4), [BEST]), scores={5: 0.5, 10: 0.7}).train()
    assert ["checkpoint-10"] == folders(tmp_path)
    make_trainer(
        tmp_path / "all", Policy(EverySteps(4), [KeepBest(5, "eval_score", mode="max")]), scores={5: 1, 10: 2}
    ).train()
    assert ["checkpoint-10", "checkpoint-5"] == folders(tmp_path / "all")


def test_an_evaluation_before_or_outside_the_training_is_no_observation(tmp_path: Path) -> None:
    """``eval_on_start`` of a fresh run, and calls before, between two steps' passes, and after."""
    seen: list[float] = []

    class Inside(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                seen.append(trainer.evaluate(metric_key_prefix="inside")["inside_score"])

    scores = {0: 9.0, 5: 0.5, 10: 0.7}
    trainer = make_trainer(
        tmp_path, Policy(EverySteps(5), [BEST]), scores=scores, eval_on_start=True, callbacks=[Inside()]
    )
    trainer.evaluate()
    trainer.train()
    trainer.evaluate(metric_key_prefix="after")
    (record,) = records(tmp_path).values()
    assert ("checkpoint-10", 0.7) == (record.name, record.metrics["eval_score"])
    assert [0.5] == seen
    assert not any(name.startswith(("inside", "after")) for name in record.metrics)


# What the Trainer says


@pytest.mark.parametrize("attached", [False, True])
def test_the_best_is_true_in_memory_and_in_the_checkpoint_and_is_loaded(tmp_path: Path, attached: bool) -> None:
    """As it was when the checkpoint was committed; the weights at the end are the best checkpoint's."""
    policy = Policy(EverySteps(2), [BEST, KeepLast(1)], last="link", best="link")
    scores = {2: 0.1, 4: 0.9, 6: 0.3, 8: 0.2, 10: 0.8}
    trainer = make_trainer(tmp_path, policy, scores=scores, eval_steps=2, attached=attached)
    trainer.args.load_best_model_at_end = True
    trainer.train()
    best = str(tmp_path / "checkpoint-4")
    for state in (vars(trainer.state), state_of(tmp_path / "checkpoint-10"), state_of(tmp_path / "checkpoint-4")):
        assert (0.9, best, 4) == tuple(state[f"best_{key}"] for key in ("metric", "model_checkpoint", "global_step"))
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(tensor, trainer.model.state_dict()[name]) for name, tensor in saved.items())
    assert ["best", "checkpoint-10", "checkpoint-4", "last"] == folders(tmp_path)


def test_the_records_say_which_is_best_whatever_the_trainer_s_account_says(tmp_path: Path) -> None:
    """An edited ``trainer_state.json`` does not change the ranking, nor does a moved folder."""
    policy = Policy(EverySteps(5), [BEST, KeepLast(1)], best="link")
    make_trainer(tmp_path / "a", policy, scores={5: 0.9, 10: 0.1}, callbacks=[Breaks(9)], eval_steps=5)
    trainer = make_trainer(tmp_path / "a", policy, scores={5: 0.9, 10: 0.1})
    trainer.train()
    shutil.move(tmp_path / "a", tmp_path / "b")
    trainer = make_trainer(tmp_path / "b", policy, scores={15: 0.5}, max_steps=15)
    trainer.train(resume_from_checkpoint=True)
    assert (0.9, str(tmp_path / "b/checkpoint-5")) == (trainer.state.best_metric, trainer.state.best_model_checkpoint)
    assert ["best", "checkpoint-15", "checkpoint-5"] == folders(tmp_path / "b")
    assert 1 == len({record.run for record in records(tmp_path / "b").values()})


# Resume


@pytest.mark.parametrize("attached", [False, True])
def test_a_resumed_training_ends_with_the_weights_of_an_unbroken_one(tmp_path: Path, attached: bool) -> None:
    """Bit for bit, with dropout, in the middle of an epoch."""
    policy = Policy(EverySteps(3), [KeepLast(2)], last="link")
    unbroken = make_trainer(tmp_path / "unbroken", policy, attached=attached)
    unbroken.train()
    with pytest.raises(ZeroDivisionError):
        make_trainer(tmp_path / "broken", attrs_no_rescue(policy), attached=attached, callbacks=[Breaks(7)]).train()
    assert "checkpoint-6" == os.readlink(tmp_path / "broken/last")
    resumed = make_trainer(tmp_path / "broken", policy, attached=attached)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights_of(unbroken), weights_of(resumed))
    assert folders(tmp_path / "unbroken") == folders(tmp_path / "broken")


def attrs_no_rescue(policy: Policy) -> Policy:
    """Return the policy without rescues."""
    return Policy(policy.when, policy.keep, last=policy.last, rescue=False)


def test_a_run_that_goes_back_leaves_what_it_abandons_where_a_trainer_does_not_resume_from_it(tmp_path: Path) -> None:
    """The Trainer would take the highest number; it is renamed, with its record, and not deleted."""
    policy = Policy(EverySteps(2), [KeepLast(2)])
    make_trainer(tmp_path, policy).train()
    assert ["checkpoint-10", "checkpoint-8"] == folders(tmp_path)
    trainer = make_trainer(tmp_path, policy, callbacks=[Breaks(9)])
    with pytest.raises(ZeroDivisionError), pytest.warns(CheckpointerWarning, match="2 checkpoints of other runs"):
        trainer.train()
    assert ["checkpoint-6", "checkpoint-8", "earlier-checkpoint-10", "earlier-checkpoint-8"] == folders(tmp_path)
    looked = CheckpointManager(tmp_path)
    assert {"earlier-checkpoint-8", "earlier-checkpoint-10"} <= {
        record.name for record in looked.session.manifest.records
    }
    assert str(tmp_path / "checkpoint-8") == last_valid_checkpoint(tmp_path)


def test_a_batch_that_does_not_fit_begins_again(tmp_path: Path) -> None:
    """``auto_find_batch_size`` enters the training anew without an end: the directory is open for it."""
    tries: list[int] = []

    def full() -> None:
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("CUDA out of memory.")

    trainer = make_trainer(
        tmp_path, Policy(EverySteps(2), [KeepLast(2)]), callbacks=[At(5, full)], auto_find_batch_size=True
    )
    trainer.train()
    assert 2 == len(tries)
    assert ["checkpoint-10", "checkpoint-8", "earlier-checkpoint-2", "earlier-checkpoint-4"] == folders(tmp_path)
    looked = CheckpointManager(tmp_path)
    assert 1 == len({record.run for record in looked.session.manifest.records})
    assert ["earlier-checkpoint-2", "earlier-checkpoint-4"] == [r.name for r in looked.session.manifest.abandoned]


# What dead trainings leave


def test_a_half_written_checkpoint_is_moved_aside_and_never_deleted(tmp_path: Path) -> None:
    """Each file missing or torn in turn; a whole one that no callback ever saw stays what it is."""
    make_trainer(tmp_path, None, save_strategy="steps", save_steps=5).train()
    whole = tmp_path / "checkpoint-10"
    for name in ("trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt"):
        for cut in (None, 0.5):
            broken = tmp_path / "checkpoint-20"
            shutil.copytree(whole, broken)
            state = broken / "trainer_state.json"
            state.write_text(state.read_text().replace('"global_step": 10', '"global_step": 20'))
            if cut is None:
                (broken / name).unlink()
            else:
                os.truncate(broken / name, int((broken / name).stat().st_size * cut))
            with pytest.warns(CheckpointerWarning, match="checkpoint-20 is not a whole checkpoint"):
                make_trainer(tmp_path, EACH)
            assert not broken.exists()
    aside = [name for name in folders(tmp_path) if name.startswith("incomplete-checkpoint-20")]
    assert 8 == len(aside)
    assert str(whole) == last_valid_checkpoint(tmp_path)
    trainer = make_trainer(tmp_path, Policy(EverySteps(5), [KeepLast(1)]), max_steps=15)
    trainer.train(resume_from_checkpoint=True)
    assert {"checkpoint-5", "checkpoint-10", "checkpoint-15"} <= set(folders(tmp_path))


class Dies(TrainerCallback):
    """Ends the process once the Trainer has written its checkpoint of a step, before the callback is called."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os._exit(9)


@pytest.mark.parametrize("keep", [1, 3])
def test_a_checkpoint_that_was_whole_when_the_training_died_is_resumed_from_and_counts(
    tmp_path: Path, keep: int
) -> None:
    """It gets its record then, with what was measured there; so it is kept and removed as in an unbroken training."""
    policy, directory = Policy(EverySteps(3), [KeepLast(keep)]), tmp_path / "run"
    make_trainer(tmp_path / "unbroken", policy, eval_steps=3).train()
    child = os.fork()
    if not child:
        trainer = make_trainer(directory, policy, eval_steps=3)
        trainer.callback_handler.callbacks.insert(0, Dies(6))
        trainer.train()
        os._exit(1)
    assert 9 == os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert str(directory / "checkpoint-6") == last_valid_checkpoint(directory)
    begins: list[int] = []
    trainer = make_trainer(directory, policy, eval_steps=3)
    trainer.add_callback(At(6, lambda: begins.append(trainer.state.global_step)))
    trainer.train(resume_from_checkpoint=True)
    assert [6] == begins
    runs = [records(tmp_path / "unbroken"), records(directory)]
    unbroken, resumed = [{name: r.metrics.get("eval_loss") for name, r in run.items()} for run in runs]
    assert unbroken == resumed
    assert folders(tmp_path / "unbroken") == folders(directory)


def test_a_checkpoint_that_lacks_the_files_of_a_rank_is_not_whole(tmp_path: Path) -> None:
    """The note about what is being written says how many processes there are."""
    make_trainer(tmp_path, None, save_strategy="steps", save_steps=10).train()
    folder = tmp_path / "checkpoint-10"
    shutil.copy(folder / "rng_state.pth", folder / "rng_state_0.pth")
    os.rename(folder / "rng_state.pth", folder / "rng_state_1.pth")
    assert str(folder) == last_valid_checkpoint(tmp_path)
    release(owner := new_owner())
    Claim(owner=owner, writing=folder.name, ranks=3).put(open_storage(tmp_path, ""))
    assert last_valid_checkpoint(tmp_path) is None


def test_a_damaged_checkpoint_is_not_resumed_from(tmp_path: Path) -> None:
    """One bit is enough; and a record whose folder is gone is set aside too."""
    policy = Policy(EverySteps(2), [KeepLast(3)])
    make_trainer(tmp_path, policy).train()
    weights = tmp_path / "checkpoint-10/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    shutil.rmtree(tmp_path / "checkpoint-6")
    assert str(tmp_path / "checkpoint-8") == last_valid_checkpoint(tmp_path)
    with pytest.warns(CheckpointerWarning) as warned:
        trainer = make_trainer(tmp_path, policy)
    said = [str(warning.message) for warning in warned]
    assert ["checkpoint-10", "checkpoint-6"] == [
        text.partition(" is not a whole")[0].rpartition("/")[2] for text in said
    ]
    assert ["checkpoint-8", "damaged-checkpoint-10"] == folders(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert {"checkpoint-8", "checkpoint-10"} == set(records(tmp_path))


def test_none_valid_is_an_error_and_nothing_is_none(tmp_path: Path) -> None:
    """A training never starts over silently."""
    assert last_valid_checkpoint(tmp_path / "none") is None
    make_trainer(tmp_path, Policy(EverySteps(5), [KeepLast(1)])).train()
    os.truncate(tmp_path / "checkpoint-10/optimizer.pt", 10)
    with pytest.raises(NoValidCheckpointError, match=r"checkpoint-10 has .* bytes, and its record says"):
        last_valid_checkpoint(tmp_path)


# What is refused


@pytest.mark.parametrize(
    ("changes", "policy", "text"),
    [
        ({"save_strategy": "steps"}, EACH, "set save_strategy='no'"),
        ({"save_total_limit": 3}, EACH, "save_total_limit=3: leave it out"),
        ({"save_on_each_node": True}, EACH, "save_on_each_node=True: leave it out"),
        ({"save_only_model": True}, EACH, r"say Policy\(..., contents='weights'\)"),
        ({}, Policy(EverySteps(1), [KeepLast(1)], contents="weights"), "set save_only_model=True"),
        ({"metric_for_best_model": "loss"}, Policy(EverySteps(1), [BEST]), r"means eval_loss \(min\)"),
        (
            {"metric_for_best_model": "score", "greater_is_better": False},
            Policy(EverySteps(1), [BEST]),
            r"means eval_score \(min\), and the policy ranks by eval_score \(max\)",
        ),
    ],
)
def test_arguments_that_contradict_the_policy_are_refused_with_the_change(
    tmp_path: Path, changes: dict[str, Any], policy: Policy, text: str
) -> None:
    """When the Trainer is made, before anything is written."""
    with pytest.raises(PolicyError, match=text):
        make_trainer(tmp_path, policy, **changes)


def test_a_directory_of_another_name_and_a_second_callback_are_refused(tmp_path: Path) -> None:
    """The Trainer writes in one place, and one policy can hold both."""
    with pytest.raises(PolicyError, match="name one in both"):
        make_trainer(tmp_path, EACH, options={"directory": tmp_path / "other"})
    with pytest.raises(PolicyError, match="make one policy of the two"):
        make_trainer(tmp_path, EACH, callbacks=[CheckpointCallback(EACH)])
    trainer = make_trainer(tmp_path, Policy(EverySteps(5), [KeepLast(1)]))
    trainer.add_callback(CheckpointCallback(EACH))
    with pytest.raises(PolicyError, match="make one policy of the two"):
        trainer.train()
    with pytest.raises(PolicyError, match="expected Policy"):
        CheckpointCallback(EverySteps(5))  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match="save= is given"):
        CheckpointCallback(EACH, save=print)
    with pytest.raises(PolicyError, match="no option 'listener'; did you mean 'listeners'"):
        CheckpointCallback(EACH, listener=print)
    with pytest.raises(PolicyError, match="no CheckpointCallback"):
        attach(make_trainer(tmp_path, None))
    late = make_trainer(tmp_path, EACH)
    late.args.load_best_model_at_end = True
    with pytest.raises(PolicyError, match="no rule ranks"):
        late.train()


def test_aliases_are_no_checkpoints_to_the_trainer(tmp_path: Path) -> None:
    """``last`` and ``best`` lead to folders, and a resume takes neither."""
    from transformers.trainer_utils import get_last_checkpoint

    policy = Policy(EverySteps(5), [BEST, KeepLast(1)], last="copy", best="copy")
    make_trainer(tmp_path, policy, scores={5: 0.9, 10: 0.1}).train()
    assert ["best", "checkpoint-10", "checkpoint-5", "last"] == folders(tmp_path)
    assert str(tmp_path / "checkpoint-10") == get_last_checkpoint(str(tmp_path))
    assert 5 == state_of(tmp_path / "best")["global_step"]
    assert 10 == state_of(tmp_path / "last")["global_step"]


def test_a_checkpoint_of_another_model_is_an_error_and_loses_nothing(tmp_path: Path) -> None:
    """Of other shapes; the Trainer says so before the callback has changed anything."""
    policy = Policy(EverySteps(5), [KeepLast(1)])
    make_trainer(tmp_path, policy).train()
    from transformers import GPT2Config, GPT2LMHeadModel

    wider = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=16, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(RuntimeError, match="size mismatch"):
        make_trainer(tmp_path, policy, model=wider, max_steps=15).train(resume_from_checkpoint=True)
    assert ["checkpoint-10"] == folders(tmp_path)
    trainer = make_trainer(tmp_path, policy, max_steps=15)
    trainer.train(resume_from_checkpoint=True)
    assert ["checkpoint-15"] == folders(tmp_path)


def test_a_schedule_free_optimizer_is_evaluated_with_the_weights_that_are_saved(tmp_path: Path) -> None:
    """The Trainer calls `eval` for an evaluation and saves after it; a save without one has the training weights."""
    trainer = make_trainer(
        tmp_path,
        Policy(EverySteps(5), [BEST, KeepLast(2)]),
        scores={10: 0.1},
        eval_steps=10,
    )
    trainer.optimizer = ScheduleFree(trainer.model.parameters())
    trainer.train()
    marks = [
        record.reason.endswith("training weights of a schedule-free optimizer") for record in records(tmp_path).values()
    ]
    assert [True, False] == marks


@pytest.mark.parametrize("attached", [False, True])
def test_going_on_from_an_older_checkpoint_says_what_a_restart_does(
    tmp_path: Path, attached: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The Trainer is given a path; until the next save ``resume_from_checkpoint=True`` means the newest."""
    policy = Policy(EverySteps(5), [KeepLast(2)])
    make_trainer(tmp_path, policy, attached=attached).train()
    caplog.clear()
    resumed = make_trainer(tmp_path, policy, attached=attached)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert "going on from step 5: until the next save, a restart goes on from checkpoint-10 (step 10)" in caplog.text
