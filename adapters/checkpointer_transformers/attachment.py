"""What a callback cannot do alone: stage a checkpoint and rename it once, rescue, and save at the very end."""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import threading
import types
from collections.abc import Callable, Iterable
from typing import Any, Final

from checkpointer.errors import PolicyError, failures_as_warnings, warn
from checkpointer.hosts.loader_workers import Workers, deliver
from checkpointer_transformers.callback import ASKED, CheckpointCallback
from checkpointer_transformers.evaluation import EvaluationEnded, Watch
from checkpointer_transformers.leader import staging_parent
from checkpointer_transformers.trainer_state import evaluated
from checkpointer_transformers.training import Training

_LOADERS: Final = ("get_train_dataloader", "get_eval_dataloader")
"""Names of the Trainer's methods that make loaders."""


def attach(trainer: Any, *, signals: Iterable[int] = (signal.SIGTERM,)) -> None:
    """Let a Trainer's `CheckpointCallback` replace methods of the Trainer; call it before ``train``, on every rank.

    After this call a checkpoint is staged, and gets its name in one rename. If a signal comes on any rank, all ranks
    save at the same step and stop. When ``train`` has cleaned up, every rank raises the signal again for its earlier
    handler. If the signal comes during an evaluation of the training, the evaluation ends after the current batch, and
    the next training runs the evaluation again. If a training of one process ends with an exception, a rescue is saved,
    and the exception is raised unchanged. There is no rescue if the exception came while the optimizer changed the
    weights. The end of the training is saved if a rule keeps it.

    Args:
        trainer: A Trainer that has a `CheckpointCallback`.
        signals: Numbers of the signals after which to save and stop.

    Raises:
        PolicyError: If the Trainer does not have a `CheckpointCallback`, or if `attach` was called before.

    Example:
        >>> trainer = Trainer(model, args, callbacks=[CheckpointCallback(policy)])  # doctest: +SKIP
        >>> attach(trainer)  # doctest: +SKIP
        >>> trainer.train(resume_from_checkpoint=last_valid_checkpoint("runs/bert"))  # doctest: +SKIP
    """
    found = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, CheckpointCallback)]
    if not found:
        msg = "this Trainer has no CheckpointCallback; pass one: Trainer(..., callbacks=[CheckpointCallback(policy)])"
        raise PolicyError(msg)
    (callback,) = found
    if isinstance(getattr(trainer.train, "__self__", None), _Attachment):
        msg = "this Trainer is attached to its CheckpointCallback already; call attach once"
        raise PolicyError(msg)
    _Attachment(trainer, callback, tuple(signals))


class _Attachment:
    """Replaces five methods of a Trainer."""

    def __init__(self, trainer: Any, callback: CheckpointCallback, signals: tuple[int, ...]) -> None:
        self._trainer, self._callback, self._signals = trainer, callback, signals
        self._before: dict[int, Any] = {}
        """The earlier handler of each signal."""
        self._save, self._train = trainer._save_checkpoint, trainer.train
        self._load_best = trainer._load_best_model
        self._evaluate, self._load_random = trainer._evaluate, trainer._load_rng_state
        self._ignored: Any = None
        """Keys of the model's output that evaluations do not gather."""
        callback._at_end = self.save_end
        trainer._save_checkpoint, trainer._load_best_model, trainer.train = self.save, self.load_best, self.train
        trainer._evaluate, trainer._load_rng_state = self.evaluate, self.load_random

    # Saving

    def save(self, model: Any, trial: Any = None, **kwargs: Any) -> None:
        """Replace ``_save_checkpoint``: stage and commit what is pending, and ask the policy about anything else."""
        training, state = self._callback._training, self._trainer.state
        if training is None:
            self._save(model, trial, **kwargs)
            return
        if not (training.pending or training.report(state, due=ASKED)):
            return

        def write(path: str) -> None:
            self._trainer._get_output_dir = lambda trial=None: staging_parent(path)
            try:
                self._save(model, trial, **kwargs)
            finally:
                del self._trainer._get_output_dir

        training.write, training.failing = write, True
        try:
            training.commit(state, self._trainer.optimizer, is_written=False)
            training.failing = False
        finally:
            training.write = None

    def save_now(self) -> None:
        """Save what is pending, and call the other callbacks."""
        trainer = self._trainer
        trainer._save_checkpoint(trainer.model, getattr(trainer, "_trial", None))
        trainer.control = trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)

    # Evaluations

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Replace ``_evaluate``, which the training calls: a signal ends it, and the Trainer saves next."""
        callback, trainer = self._callback, self._trainer
        training = callback._training
        if training is None:
            return self._evaluate(*args, **kwargs)
        watch = Watch(trainer.model, training.ranks, lambda: bool(callback._signal or training.stopping))
        callback._at_batch = watch.look
        try:
            metrics = self._evaluate(*args, **kwargs)
        except EvaluationEnded:
            watch.undo()
            if trainer.state.global_step:  # Before the first step there is nothing to save.
                callback._is_stopped(training, trainer.state, trainer.control)
            # The Trainer looks for its best metric next.
            name = trainer.args.metric_for_best_model
            return {} if name is None else {evaluated(name): math.nan}
        finally:
            callback._at_batch = None
        if not kwargs.get("skip_scheduler"):  # The evaluation on start is another one.
            training.owes_evaluation = False
        return metrics

    def load_random(self, checkpoint: str | None) -> None:
        """Replace ``_load_rng_state``; then run the evaluation that the checkpoint owes."""
        self._load_random(checkpoint)
        training, trainer = self._callback._training, self._trainer
        if training is None or not training.owes_evaluation or trainer.eval_dataset is None:
            return
        trainer._determine_best_metric(trainer._evaluate(None, self._ignored), None)
        if trainer.control.should_save:
            self.save_now()

    # The end

    def save_end(self) -> None:
        """Save the end of the training if a rule keeps it, and it is not saved."""
        training, state = self._callback._training, self._trainer.state
        if training is None or training.stopping or training.ended or not state.global_step:
            return
        training.ended = True
        if training.report(state, due="the training ends"):
            self.save_now()

    def load_best(self) -> None:
        """Replace ``_load_best_model``: afterwards the weights are not those of the last step."""
        self.save_end()
        training = self._callback._training
        if training is None or not training.stopping:
            self._load_best()

    # Signals and exceptions

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Replace ``train``."""
        callback = self._callback
        self._ignored = kwargs.get("ignore_keys_for_eval", args[2] if len(args) > 2 else None)
        with contextlib.ExitStack() as ends:
            self._take_signals(ends)
            self._cover_workers(ends)
            try:
                result = self._train(*args, **kwargs)
            except BaseException as error:
                self._rescue(error)
                raise
            finally:
                callback._close()
        if number := callback._stopped_by or callback._signal:
            deliver(number)
        return result

    def _take_signals(self, ends: contextlib.ExitStack) -> None:
        if threading.current_thread() is not threading.main_thread():
            msg = "train() does not run in the main thread, so signals cannot be caught"
            warn(msg)
            return
        for number in self._signals:
            self._before[number] = signal.signal(number, self._note)
        ends.callback(self._give_back, *self._signals)

    def _cover_workers(self, ends: contextlib.ExitStack) -> None:
        """Let the loaders' workers outlive the signals."""
        workers = Workers(self._signals, lambda: bool(self._callback._signal))
        workers.listen()
        ends.callback(workers.leave)
        own = vars(self._trainer)
        ends.callback(own.update, {name: own[name] for name in _LOADERS if name in own})
        for name in _LOADERS:
            own[name] = functools.partial(_covered, workers, getattr(self._trainer, name))
            ends.callback(own.pop, name)

    def _give_back(self, *numbers: int) -> None:
        for number in numbers:
            signal.signal(number, self._before.get(number) or signal.SIG_DFL)

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        if self._callback._training is None:
            # Outside of the training there is nothing to rescue.
            self._give_back(number)
            signal.raise_signal(number)
        self._callback._signal = number
        self._callback._grace.begin()

    def _rescue(self, error: BaseException) -> None:
        training, state = self._callback._training, self._trainer.state
        if training is None or not isinstance(error, (Exception, KeyboardInterrupt)):
            return
        if not training.policy.rescue or not state.global_step:
            return
        if obstacle := _obstacle(training):
            warn(f"no rescue checkpoint: {obstacle}")
            return
        # The error that ended the training must be the one that is raised.
        with failures_as_warnings("no rescue checkpoint could be written"):
            if training.rescue(state, f"{type(error).__name__}: {error}"):
                self.save_now()


def _covered(workers: Workers, make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    loader = make(*args, **kwargs)
    workers.cover(loader)
    return loader


def _obstacle(training: Training) -> str:
    if training.ranks.size > 1:
        # The others may be waiting elsewhere, so the exception has to end this rank.
        return "one rank alone cannot save"
    if training.failing:
        return "a save failed"
    return "the weights were changing" if training.phase == "stepping" else ""
