"""The Trainer's callback: it turns events into observations, and decisions into ``control.should_save``."""

import math
import os
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import attrs
from transformers import TrainerCallback

from checkpointer import Decision, Policy
from checkpointer.clock import SystemClock
from checkpointer.distributed.ranks import OneRank, TorchRanks
from checkpointer.distributed.team import on_rank_zero
from checkpointer.errors import PolicyError, warn
from checkpointer.hosts.grace import Grace
from checkpointer.manager_options import check_options
from checkpointer.ports import Clock, Ranks
from checkpointer_transformers.argument_check import refuse
from checkpointer_transformers.find_checkpoint import clear
from checkpointer_transformers.trainer_state import ends_epoch, epoch_of, numbers_of
from checkpointer_transformers.training import Training

ASKED: Final = "another callback asked for it"
_CALLBACKS: Final[weakref.WeakSet[Any]] = weakref.WeakSet()
"""Every callback of this process."""


class CheckpointCallback(TrainerCallback):
    """Lets a `checkpointer.Policy` decide when the Trainer saves, and which of its checkpoints stay.

    The Trainer still writes the folders ``checkpoint-<step>`` into its ``output_dir``, with the same content as without
    this callback. Set ``save_strategy="no"``, and leave ``save_total_limit`` out. When all ranks have written a
    checkpoint, the checkpoint gets a record, and counts from then on. If a training was killed during a save, the
    unfinished folder is renamed when the next Trainer is made, so that ``resume_from_checkpoint=True`` is safe.
    `attach` adds what a callback cannot do.

    Args:
        policy: When to save and what to keep. The Trainer names the checkpoints; the policy's template is not used.
        directory: The Trainer's ``output_dir``, or None. Another directory is an error.
        grace_s: Seconds between a signal and the kill that follows it, if known. With `attach`, if a signal stops the
            training, its end waits for the mirror at most that long.
        clock: Returns the time. Only rank 0's clock is used.
        **options: Further options of `checkpointer.CheckpointManager`, such as ``listeners``, ``trust``, ``mirror``.

    Raises:
        PolicyError: If `checkpointer.CheckpointManager` does not have an option. Also when the Trainer is made, if the
            Trainer's arguments contradict the callback; the message names each change to make.

    Example:
        >>> from checkpointer import EverySteps, KeepBest, KeepLast, Policy
        >>> policy = Policy(EverySteps(500), [KeepBest(2, "eval_loss", mode="min"), KeepLast(1)])
        >>> args = TrainingArguments("runs/bert", save_strategy="no", eval_strategy="steps")  # doctest: +SKIP
        >>> trainer = Trainer(model, args, callbacks=[CheckpointCallback(policy)])  # doctest: +SKIP
    """

    def __init__(
        self,
        policy: Policy,
        directory: str | os.PathLike[str] | None = None,
        *,
        grace_s: float = math.inf,
        clock: Clock | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(policy, Policy):
            msg = f"policy is {policy!r}; expected Policy(when, keep)"
            raise PolicyError(msg)
        for name in ("state", "weights", "save", "format", "run", "label"):
            if name in options:
                msg = f"{name}= is given, but the Trainer writes the checkpoints, and names the run; leave it out"
                raise PolicyError(msg)
        check_options(options, type(self).__name__)
        self.policy = _with_trainer_names(policy)
        self.directory = directory
        self._clock = clock or SystemClock()
        self._options: Mapping[str, Any] = options
        self._ranks: Ranks | None = None
        self._training: Training | None = None
        self._at_end: Callable[[], None] | None = None
        """Saves the end of the training, if the callback is attached to its Trainer."""
        self._at_batch: Callable[[], None] | None = None
        """Ends an evaluation of the training after a batch, if the callback is attached and one is running."""
        self._signal = 0
        """Number of the signal that this rank got; 0 without one."""
        self._grace = Grace(grace_s)
        self._stopped_by = 0
        """Number of the signal that ended the training, on every rank."""
        self._state: Any = None
        _CALLBACKS.add(self)

    # Begin and end

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse arguments that contradict the policy, and rename what must not be resumed from."""
        refuse(args, self.policy)
        self._at_end = None
        self._check_single(state)
        folder = self._folder(args)
        on_rank_zero(self._open_ranks(args), lambda: clear(folder, self._options))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the directory, and go on with the run that was resumed."""
        if self._state is None:
            self.on_init_end(args, state, control)
        refuse(args, self.policy)  # They may have been changed since.
        self._check_single(state)
        if state.is_hyper_param_search:
            msg = "hyperparameter_search writes each trial to a folder of its own, which no policy can span; train each"
            raise PolicyError(msg)
        # After an exception, or a batch that did not fit in memory, the Trainer begins anew without an end.
        again = self._training.state_dict() if self._training is not None else {}
        for other in (self, *_CALLBACKS):
            if other._training is not None and other._training.folder == self._folder(args):
                other._close()
        self._signal = self._stopped_by = 0
        self._grace = Grace(self._grace.seconds)
        self._training = Training(
            self._folder(args), args.output_dir, self.policy, self._open_ranks(args), self._clock, self._options
        )
        self._training.open(state, again)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the end, if attached, and close the directory."""
        if self._at_end is not None:
            self._at_end()
        self._close()

    def _close(self) -> None:
        training, self._training = self._training, None
        if training is not None:
            training.close(timeout=self._grace.left)

    def _check_single(self, state: Any) -> None:
        """Refuse a second callback in one Trainer: both get its state."""
        self._state = state
        for other in _CALLBACKS:
            if other is not self and other._state is state:
                msg = (
                    "two CheckpointCallbacks in one Trainer would own the same checkpoint-<step>; make one policy of "
                    "the two: Policy(AnyOf(when, when), [*keep, *keep])"
                )
                raise PolicyError(msg)

    def _folder(self, args: Any) -> Path:
        folder = _absolute(args.output_dir)
        if self.directory is not None and _absolute(self.directory) != folder:
            msg = (
                f"directory is {os.fspath(self.directory)!r}, and the Trainer writes to output_dir="
                f"{args.output_dir!r}; name one in both, or leave directory out"
            )
            raise PolicyError(msg)
        return folder

    def _open_ranks(self, args: Any) -> Ranks:
        if self._ranks is None:
            self._ranks = TorchRanks() if args.world_size > 1 else OneRank()
        return self._ranks

    # Steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that the passes begin: what is measured from now on does not belong to a finished step."""
        if self._training is not None:
            self._training.phase, self._training.pending = "forward", None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that weights and optimizer are about to change."""
        if self._training is not None:
            self._training.phase = "stepping"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report a step; costs two comparisons unless something is due."""
        training = self._between_steps(control)
        if training is None:
            return
        due = not training.is_quiet(state, epoch_of(state)) and not training.is_waiting
        called = training.agreed(flag=bool(self._signal), attached=self._at_end is not None)
        if not (due or called or control.should_save):
            return
        # The evaluation at the end of the epoch comes after this save.
        training.owes_evaluation = args.eval_strategy == "epoch" and ends_epoch(state)
        if not (called and self._is_stopped(training, state, control)):
            self._report(training, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the end of an epoch, and of the training if that ends here."""
        training = self._between_steps(control)
        if training is None or not state.global_step:
            return
        stops = bool(control.should_training_stop)
        is_whole = ends_epoch(state) or not (stops or control.should_epoch_stop)
        due = "the training ends" if stops else ""
        quiet = training.is_quiet(state, epoch_of(state) + is_whole)
        if due or not quiet or control.should_save or training.is_saved(state):
            self._report(training, state, control, epoch_end=is_whole, due=due)

    def _between_steps(self, control: Any) -> Training | None:
        """Note that a step has ended, and return the training if it goes on."""
        training = self._training
        if training is None:
            return None
        training.phase = "between"
        if training.stopping:  # A signal ended an evaluation before this step, and that state is saved.
            control.should_save = control.should_evaluate = False
            return None
        return training

    def _report(self, training: Training, state: Any, control: Any, *, epoch_end: bool = False, due: str = "") -> None:
        due = due or (ASKED if control.should_save else "")
        control.should_save = bool(training.report(state, epoch_end=epoch_end, due=due))

    def _is_stopped(self, training: Training, state: Any, control: Any) -> bool:
        """Rescue and stop if any rank got a signal; all ranks come here at the same step."""
        signals = [number for number in training.ranks.gather(self._signal) if number]
        if not signals:
            return False
        self._stopped_by = signals[0]
        self._grace.begin()  # A rank that got no signal itself begins here.
        training.owes_evaluation = bool(training.owes_evaluation or control.should_evaluate)
        decision: Decision | None = training.pending or training.report(state)
        if not decision:
            decision = training.rescue(state, f"signal {signals[0]}")
        training.stopping = control.should_training_stop = True
        control.should_evaluate = control.should_log = False
        control.should_save = bool(decision)
        return True

    # Evaluations

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the evaluation after this batch if a rank got a signal, and the callback is attached."""
        if self._at_batch is not None:
            self._at_batch()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Take in what was measured at this step."""
        self._measured(state, control, numbers_of(logs or {}), anew=False)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Take in the metrics of one evaluation set, in case the Trainer's `log` is overridden and did not log them.

        A signal within an evaluation that was not ended stops the training here: the Trainer saves next, before
        another step.
        """
        self._measured(state, control, numbers_of(metrics or {}), anew=True)
        training = self._training
        if training is not None and training.phase == "between" and state.global_step:
            self._stop_if_asked(training, state, control)

    def _stop_if_asked(self, training: Training, state: Any, control: Any) -> None:
        if self._at_end is None or training.stopping:
            return
        if any(training.ranks.highest(float(self._signal))):
            self._is_stopped(training, state, control)

    def _measured(self, state: Any, control: Any, metrics: Mapping[str, Any], *, anew: bool) -> None:
        training = self._training
        # Outside a training, or within a step, a metric is not of the state that would be saved.
        if training is None or training.phase != "between" or not state.global_step or not metrics:
            return
        if training.measured(state, metrics, anew=anew):
            control.should_save = bool(training.report(state)) or control.should_save

    # Saving

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Commit what the Trainer has written, unless `attach` has done so already.

        A signal within the save stops an attached training here, before another step.
        """
        training = self._training
        if training is None:
            return
        if self._at_end is not None:
            self._stop_if_asked(training, state, control)
        elif training.pending or training.report(state, due=ASKED, is_written=True):
            training.commit(state, kwargs.get("optimizer"), is_written=True)
        else:
            msg = (
                f"checkpoint-{state.global_step} was written because another callback set should_save after this one. "
                "The policy did not ask for it, so it is neither ranked nor removed. If it existed before, its record "
                "no longer fits. Pass CheckpointCallback after that callback, or call attach(trainer)"
            )
            warn(msg)


def _with_trainer_names(policy: Policy) -> Policy:
    """Return the policy with the names that the Trainer gives: folders called ``checkpoint-<step>``."""
    naming = attrs.evolve(
        policy.name, template="checkpoint-{step}", auto_insert=False, join="-", extension="", version_counter=True
    )
    return attrs.evolve(policy, name=naming)


def _absolute(directory: str | os.PathLike[str]) -> Path:
    return Path(os.path.abspath(os.path.expanduser(os.fspath(directory))))
