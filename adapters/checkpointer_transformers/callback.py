"""The Trainer's callback: its events become observations, and decisions become ``control.should_save``."""

import math
import os
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from checkpointer import Decision, Policy, Save
from checkpointer.distributed.ranks import OneRank, TorchRanks, on_rank_zero
from checkpointer.errors import PolicyError
from checkpointer.hosts.grace import Grace
from checkpointer.manager import check_options
from checkpointer.ports import Clock, Ranks
from checkpointer_transformers.argument_check import refuse
from checkpointer_transformers.cleanup import clear
from checkpointer_transformers.trainer_state import epoch_of, finished_epochs, numbers_of
from checkpointer_transformers.training import ASKED, Training, as_written, folder_of

if TYPE_CHECKING:
    from transformers import TrainerCallback as Base
else:
    from transformers import TrainerCallback as Base

__all__ = ["CheckpointCallback"]

_LIVING: Final[weakref.WeakSet[Any]] = weakref.WeakSet()
"""Every callback there is."""


class CheckpointCallback(Base):
    """Says when the Trainer saves, and which of its checkpoints stay: a `checkpointer.Policy` decides.

    The Trainer itself writes ``checkpoint-<step>`` into its ``output_dir``, so whatever it can save and resume, it
    still can. It needs ``save_strategy="no"``, and ``save_total_limit`` left out. Once a checkpoint is written by all
    ranks it gets a record, and counts. What a training that was killed has left half-way is moved aside when the next
    Trainer is made, so that ``resume_from_checkpoint=True`` is safe. `attach` adds what no callback can do.

    Args:
        policy: When to save and what to keep. Names are the Trainer's; the template is not used.
        directory: The Trainer's ``output_dir``, to say so; None takes that.
        grace_s: Seconds between a signal and the kill that follows it, if that is known: with `attach`, the end of a
            stopped training waits for the mirror no longer than that.
        clock: Where the time comes from, on rank 0.
        **options: What else `checkpointer.CheckpointManager` takes, such as ``listeners``, ``trust`` or ``mirror``.

    Raises:
        PolicyError: For an option that `checkpointer.CheckpointManager` does not have. When the Trainer is made, if
            its arguments would fight the callback; names each change to make.

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
                msg = f"{name}= is given, but it is the Trainer that writes, and the run is its own; leave it out"
                raise PolicyError(msg)
        check_options(options, type(self).__name__)
        self.policy = as_written(policy)
        self.directory = directory
        self._clock = clock
        self._options: Mapping[str, Any] = options
        self._ranks: Ranks | None = None
        self._training: Training | None = None
        self._at_end: Callable[[], None] | None = None
        """Saves the end of the training, if the callback is attached to its Trainer."""
        self._at_batch: Callable[[], None] | None = None
        """Ends an evaluation of the training after a batch, if the callback is attached and one is running."""
        self._signal = 0
        """Number of the signal that came; 0 if none did."""
        self._grace_s = grace_s
        self._grace = Grace(grace_s)
        self._stopped_by = 0
        """Number of the signal that ended the training, on every rank."""
        self._state: Any = None
        _LIVING.add(self)

    # Begin and end

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what would fight, and move aside what must not be resumed from."""
        refuse(args, self.policy)
        self._at_end = None
        self._meet(state)
        folder = self._folder(args)
        on_rank_zero(self._talk(args), lambda: clear(folder, self._options))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the directory, and go on with the run that was resumed."""
        if self._state is None:
            self.on_init_end(args, state, control)
        refuse(args, self.policy)  # They may have been changed since.
        self._meet(state)
        if state.is_hyper_param_search:
            msg = "hyperparameter_search writes each trial to a folder of its own, which no policy can span; train each"
            raise PolicyError(msg)
        # A batch that did not fit in memory begins the training anew without ending it; so does an exception.
        again = self._training.state_dict() if self._training is not None else {}
        for other in (self, *_LIVING):
            if other._training is not None and other._training.folder == self._folder(args):
                other._close()
        self._signal = self._stopped_by = 0
        self._grace = Grace(self._grace_s)
        self._training = Training(
            self._folder(args),
            self.policy,
            self._talk(args),
            output_dir=args.output_dir,
            options=self._options,
            clock=self._clock,
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

    def _meet(self, state: Any) -> None:
        """Refuse a second callback in one Trainer: they share its state."""
        self._state = state
        for other in _LIVING:
            if other is not self and other._state is state:
                msg = (
                    "two CheckpointCallbacks in one Trainer would own the same checkpoint-<step>; make one policy of "
                    "the two: Policy(AnyOf(when, when), [*keep, *keep])"
                )
                raise PolicyError(msg)

    def _folder(self, args: Any) -> Path:
        folder = folder_of(args.output_dir)
        if self.directory is not None and folder_of(os.fspath(self.directory)) != folder:
            msg = (
                f"directory is {os.fspath(self.directory)!r}, and the Trainer writes to output_dir="
                f"{args.output_dir!r}; name one in both, or leave directory out"
            )
            raise PolicyError(msg)
        return folder

    def _talk(self, args: Any) -> Ranks:
        if self._ranks is None:
            self._ranks = TorchRanks() if args.world_size > 1 else OneRank()
        return self._ranks

    # Steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that the passes begin: what is measured from now on is of no whole step."""
        if self._training is not None:
            self._training.phase, self._training.pending = "forward", None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that weights and optimizer are about to change."""
        if self._training is not None:
            self._training.phase = "stepping"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report a step; costs two comparisons unless something is due."""
        training = self._training
        if training is None:
            return
        training.phase = "between"
        if training.stopping:  # An evaluation before this step was ended: what it belongs to is saved.
            control.should_save = control.should_evaluate = False
            return
        due = not training.is_quiet(state, epoch_of(state)) and not training.is_waiting()
        called = training.agreed(flag=bool(self._signal), attached=self._at_end is not None)
        if not (due or called or control.should_save):
            return
        # The evaluation at the end of the epoch comes after this save.
        training.owes_evaluation = args.eval_strategy == "epoch" and finished_epochs(state) > epoch_of(state)
        if not (called and self._is_stopped(training, state, control)):
            self._report(training, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the end of an epoch, and of the training if that ends here."""
        training = self._training
        if training is None or not state.global_step:
            return
        training.phase = "between"
        if training.stopping:
            control.should_save = control.should_evaluate = False
            return
        stops = bool(control.should_training_stop)
        is_whole = finished_epochs(state) > epoch_of(state) or not (stops or control.should_epoch_stop)
        due = "the training ends" if stops else ""
        quiet = training.is_quiet(state, epoch_of(state) + is_whole)
        if due or not quiet or control.should_save or training.is_saved(state):
            self._report(training, state, control, epoch_end=is_whole, due=due)

    def _report(self, training: Training, state: Any, control: Any, *, epoch_end: bool = False, due: str = "") -> None:
        due = due or (ASKED if control.should_save else "")
        decision = training.report(state, epoch_end=epoch_end, due=due)
        control.should_save = isinstance(decision, Save)

    def _is_stopped(self, training: Training, state: Any, control: Any) -> bool:
        """Rescue and stop if a signal came on any rank; all ranks come here at the same step."""
        signals = [number for number in training.ranks.gather(self._signal) if number]
        if not signals:
            return False
        self._stopped_by = signals[0]
        self._grace.begin()  # Here for a rank that got no signal itself.
        training.owes_evaluation = bool(training.owes_evaluation or control.should_evaluate)
        decision: Decision | None = training.pending or training.report(state)
        if not isinstance(decision, Save):
            decision = training.rescue(state, f"signal {signals[0]}")
        training.stopping = control.should_training_stop = True
        control.should_evaluate = control.should_log = False
        control.should_save = isinstance(decision, Save)
        return True

    # Evaluations

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the evaluation after this batch if a signal came, and `attach` is there to see to it."""
        if self._at_batch is not None:
            self._at_batch()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Take in what was measured at this step."""
        self._measured(state, control, numbers_of(logs or {}), anew=False)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Take in what one evaluation set gave; it was logged just before, unless the Trainer's `log` is overridden.

        A signal that came meanwhile stops the training here if it did not end the evaluation: the Trainer saves next,
        before another step.
        """
        self._measured(state, control, numbers_of(metrics or {}), anew=True)
        training = self._training
        if training is not None and training.phase == "between" and state.global_step:
            self._stop_if_asked(training, state, control)

    def _stop_if_asked(self, training: Training, state: Any, control: Any) -> None:
        """Stop where every rank comes, and another step would take the time that is left."""
        if self._at_end is None or training.stopping:
            return
        if any(training.ranks.highest(float(self._signal))):
            self._is_stopped(training, state, control)

    def _measured(self, state: Any, control: Any, metrics: Mapping[str, Any], *, anew: bool) -> None:
        training = self._training
        # Outside a training, or within a step, it says nothing about the state that would be saved.
        if training is None or training.phase != "between" or not state.global_step or not metrics:
            return
        is_new = training.measured(state.global_step, metrics, anew=anew)
        if training.pending is not None or training.stopping or (anew and not is_new):
            return
        if training.is_saved(state) or not training.is_quiet(state, training.epochs(state)):
            decision = training.report(state)
            control.should_save = control.should_save or isinstance(decision, Save)

    # Saving

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Commit what the Trainer has written, unless `attach` has done so already.

        A signal that came meanwhile stops an attached training here, before another step.
        """
        training = self._training
        if training is None:
            return
        if self._at_end is not None:
            self._stop_if_asked(training, state, control)
            return
        if training.pending is None and not isinstance(training.report_written(state), Save):
            training.warn_of_stranger(state)
            return
        training.commit(state, kwargs.get("optimizer"), written=True)
