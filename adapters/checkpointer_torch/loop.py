"""The loop: a hand-written training calls it to be saved, resumed exactly, and stopped in time."""

from __future__ import annotations

import copy
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Final, TypeVar

from checkpointer import CheckpointManager, Decision, Policy, Progress, Record, Skip
from checkpointer.distributed.manager import DistributedManager
from checkpointer.distributed.ranks import OneRank, TorchRanks
from checkpointer.errors import ObservationError, RanksError, warn
from checkpointer.hosts.grace import Grace
from checkpointer.policy.triggers import Trigger, horizon_of
from checkpointer.ports import Ranks, Storage
from checkpointer_torch.foreign_loaders import FunctionLoader
from checkpointer_torch.interruption import END, Interruption
from checkpointer_torch.open_training import open_training
from checkpointer_torch.resume_from_foreign import StateMap
from checkpointer_torch.resume_source import ResumeSource
from checkpointer_torch.signals import SAVE_ON, STOP_ON, Requests, request_file
from checkpointer_torch.training_objects import world_size
from checkpointer_torch.training_position import LoopProgress

_log: Final = logging.getLogger("checkpointer.torch")
_NOTHING: Final[Mapping[str, Any]] = {}
_NO_NAMES: Final[frozenset[str]] = frozenset()
_ACCUMULATING: Final = Skip(reason="gradients are accumulated: the optimizer has not stepped")
_SILENT_STEPS: Final = 1000
"""After so many steps without an epoch the loop checks whether its policy can save anything."""
T = TypeVar("T")


class Loop:
    """Wraps a training loop: a policy saves it, a resume is exact, and signals stop it at a step boundary.

    Give every object whose state matters by name: modules, optimizers, schedulers, scalers, averages, anything with
    ``state_dict``, loaders, random generators, tensors, dicts, dataclasses, namespaces and plain values (then
    ``loop["name"]``). Give a value that the program binds anew as a function, ``hidden=lambda: hidden``: the loop calls
    it at each save, and ``loop["hidden"]`` returns the value that a resume has put back. The random states of python,
    numpy, torch and CUDA are always saved, and so is the place in the data. The ``repr`` lists all of it.

    With several processes each makes a Loop, with the same arguments. If a tensor of a module is a shard (a DTensor, as
    FSDP2 and tensor parallelism make them), each process writes its shards into one folder, and any number of processes
    can go on from it.

    Use it as a context manager. A signal is delayed until the next step boundary, where a rescue is saved; the
    ``with`` block ends there, and the signal goes on to its earlier handler: by default it ends the process. An
    exception makes a rescue too, and passes unchanged.

    Args:
        directory: As for `CheckpointManager`.
        policy: When to save and what to keep.
        options: Further arguments of `CheckpointManager`, such as ``{"trust": key, "mirror": url}``.
        config: The settings of the training: a dict, an ``argparse.Namespace``, a dataclass. They are saved, and
            compared at a resume, where each difference is logged. They are never put back; `read_config` reads them.
        ranks: The processes of the training; None takes those of ``torch.distributed``, if it is initialised.
        stop_on: Signals that end the training.
        save_on: Signals that ask for a save, without an end.
        grace_s: Seconds between a signal and the kill that follows it, if that is known. If a rescue may be too late,
            a warning says so; after these seconds no rank waits for the writer thread or the mirror any longer.
        **objects: The state of the training.

    Raises:
        PolicyError: If nothing of an object can be saved, if it has the name of an option of `CheckpointManager`, for
            an unknown option, or for a format that cannot hold the shards of the training.
        RanksError: On every rank, if one of them has another training, policy or version of this library.
        StorageError: If the directory cannot be used.

    Example:
        >>> import torch
        >>> from checkpointer import EveryEpochs, KeepLast, Policy
        >>> model = torch.nn.Linear(1, 1)
        >>> with Loop(None, Policy(EveryEpochs(1), [KeepLast(1)]), model=model) as loop:
        ...     start = loop.resume()
        ...     for epoch in loop.epochs(2):
        ...         for batch in loop.batches([1.0, 2.0, 3.0]):
        ...             loss = model(torch.tensor([batch])).sum()
        ...             decision = loop.step({"loss": loss})
        ...     loop.progress
        LoopProgress(epoch=2, step=6, batch=0, source='')
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | Storage | None,
        policy: Policy,
        *,
        options: Mapping[str, Any] = _NOTHING,
        config: Any = None,
        ranks: Ranks | None = None,
        stop_on: Iterable[int] = STOP_ON,
        save_on: Iterable[int] = SAVE_ON,
        grace_s: float = math.inf,
        **objects: Any,
    ) -> None:
        self._own_ranks = TorchRanks() if ranks is None and world_size() > 1 else None
        self._ranks: Ranks = self._own_ranks or ranks or OneRank()
        self._training = training = open_training(objects, self._ranks, config=config, options=options)
        self._position, self._accumulates = training.position, training.accumulates
        self._when = policy.when
        kept = {**options, "state": training.take, "weights": training.weights}
        kept["listeners"] = (*options.get("listeners", ()), training)
        if training.sharded is not None:
            kept |= {"state": training.sharded, "format": "dcp"}
        self._saver: CheckpointManager | DistributedManager
        self._is_alone = self._ranks.size == 1
        if self._is_alone:
            self._saver = CheckpointManager(directory, policy, **kept)
        else:
            self._saver = DistributedManager(directory, policy, ranks=self._ranks, **kept)
        self._source = ResumeSource(self._saver, training, directory, options)
        file = request_file(directory) if self._ranks.rank == 0 else None
        grace = Grace(grace_s)
        self._requests = Requests(stop_on, save_on, file, grace=grace)
        self._interruption = Interruption(self._saver, training, self._ranks, self._requests, grace)
        self._metrics: Mapping[str, Any] = _NOTHING
        self._reported = _NO_NAMES
        """Names of the metrics that `report` was given."""
        self._start = 0
        self._check_at: float = _SILENT_STEPS
        """At this step the loop checks whether its policy can save anything, or whether it sees its batches."""
        self._is_entered = self._is_in_epochs = False
        self._is_feeding = self._is_held = False
        """Whether `batches` has more batches to give in this epoch, and whether a report waits for its end."""
        self._has_warned_of_left_over = False

    # The training

    @property
    def progress(self) -> LoopProgress:
        """The place of the training: epoch, step and batch."""
        return self._position.progress

    @property
    def stopped(self) -> str:
        """Why a signal stopped the training at a boundary; empty if none did."""
        return self._interruption.stopped

    @property
    def manager(self) -> CheckpointManager:
        """The manager that decides and saves. With several processes only rank 0 has it; all have `best` and `last`.

        Raises:
            RanksError: On another rank than 0.
        """
        manager = self._saver if isinstance(self._saver, CheckpointManager) else self._saver.manager
        if manager is None:
            msg = f"rank {self._ranks.rank} has no manager, rank 0 has; loop.best and loop.last are known to all"
            raise RanksError(msg)
        return manager

    @property
    def best(self) -> Record | None:
        """The best checkpoint: see `CheckpointManager.best`."""
        return self._saver.best

    @property
    def last(self) -> Record | None:
        """The newest checkpoint: see `CheckpointManager.last`."""
        return self._saver.last

    @property
    def config(self) -> dict[str, Any] | None:
        """The settings as they are saved: a copy of ``config=``, as plain data."""
        return copy.deepcopy(self._training.config)

    def __getitem__(self, name: str) -> Any:
        """Return a plain value that was given by this name, or a function's: the restored one after a resume."""
        return self._training.objects[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._training.objects[name] = value

    def epochs(self, count: int | None = None) -> Iterator[int]:
        """Yield the index of each epoch that is left. When the body is through, the epoch has ended.

        An epoch that was left within is yielded again: `batches` then yields the batches left. An epoch without `step`
        counts as one step.

        Args:
            count: How many the training has in all; None goes on until a ``break``.
        """
        position = self._position
        self._check_entered()
        # At the first step of an epoch that was left within, the loop checks whether `batches` was called.
        self._check_at = position.step if position.data.used else math.inf
        self._is_in_epochs = True
        try:
            while count is None or position.epoch < count:
                position.unfed_since = position.step
                yield position.epoch
                self._end_epoch()
        finally:
            self._is_in_epochs = False

    def end_epoch(self, metrics: Mapping[str, Any] = _NOTHING) -> Decision:
        """Report that an epoch has ended. Call it if the loop does not use `epochs`, for example if events drive it.

        Args:
            metrics: The metrics of the state after the epoch.

        Returns:
            The decision, with its reason.

        Raises:
            ObservationError: Within `epochs`, which ends its epochs itself.
            StopTraining: If a signal asked for the end.
            SaveError: If a checkpoint could not be written.
        """
        self._check_entered()
        if self._is_in_epochs:
            msg = "end_epoch() within epochs(), which ends the epoch itself when the body is through; leave it out"
            raise ObservationError(msg)
        self._check_at = math.inf
        return self._end_epoch(metrics)

    def steps(self, count: int | None = None) -> Iterator[int]:
        """Yield the index of each step that is left, for a training by iterations.

        Call `step` at the end of the body. If the body does not call `step`, the body counts as one step. If a
        validation draws random numbers or changes the saved state, run it before `step`, and pass its metrics to
        `step`. Any other validation may run after `step`, and pass its metrics to `report`. Leave the loop after
        `step`, because the state in the middle of a step is not saved.

        Args:
            count: Steps of the whole training, those before a resume included; None goes on until a ``break``.

        Raises:
            ObservationError: If the Loop is used outside of its ``with`` block.

        Example:
            >>> import torch
            >>> from checkpointer import EverySteps, KeepLast, Policy
            >>> from checkpointer_torch import Loop
            >>> with Loop(None, Policy(EverySteps(2), [KeepLast(1)]), model=torch.nn.Linear(1, 1)) as loop:
            ...     for index in loop.steps(4):
            ...         _ = loop.step({"loss": 1.0})
            >>> loop.progress.step
            4
        """
        position = self._position
        self._check_entered()
        while count is None or position.step < count:
            position.is_within_step = True
            before = position.step
            yield before
            if position.step == before:
                self.step()

    def batches(self, loader: Iterable[T] | Callable[[], T], *, limit: int | None = None) -> Iterator[T]:
        """Yield the batches of this epoch, once per epoch; after a resume those that are left.

        A ``DataLoader`` with an index skips the used batches without reading them; a loader with a ``state_dict`` goes
        on by itself; anything else is read again up to the place. ``set_epoch`` of the loader, its samplers and its
        dataset is called.

        Args:
            loader: The training's data: a loader, any other iterable, or a function that returns a batch. The place
                of a function is the random states, or its own ``state_dict``; give it a ``limit``.
            limit: Batches that an epoch has at most; None goes on until the loader ends.

        Raises:
            ObservationError: If the epoch has had its pass through the data, or the loader has no batches.
            MismatchError: If a place of this loader cannot be restored, or it is not the loader that was left: it has
                another length, batch size, sampler or number of workers. ``resume(strict=False)`` warns instead.
        """
        self._check_entered()
        if self._position.is_fed:
            msg = f"epoch {self._position.epoch} had its batches already; for a validation call loop.validation(loader)"
            raise ObservationError(msg)
        self._position.is_fed, self._position.unfed_since = True, None
        source = loader if isinstance(loader, Iterable) else FunctionLoader(loader)
        return self._batches(source, math.inf if limit is None else limit)

    def _batches(self, loader: Iterable[T], limit: float) -> Iterator[T]:
        position, data, interruption = self._position, self._position.data, self._interruption
        attend = interruption.attend_alone
        self._is_feeding = True
        attend()
        interruption.workers.cover(loader)
        # A pass that has had its limit is not begun: a generator would read a batch.
        batches = self._training.batches(loader) if data.used < limit else iter(())
        try:
            while data.given < limit:
                batch = interruption.fetch(batches, attend)
                if batch is END:
                    data.run_out()
                    self._check_given(loader)
                    break
                data.give(batch)
                position.is_within_step = True
                yield batch
                if self._requests.is_pending:
                    attend()
        finally:
            self._is_feeding = False

    def _check_given(self, loader: Any) -> None:
        if not self._position.data.given:
            msg = (
                f"epoch {self._position.epoch} has no batches: {type(loader).__name__} gave none. An iterator or "
                "generator that was used up by an epoch before cannot begin anew; give batches() a loader, or a new "
                "one each epoch"
            )
            raise ObservationError(msg)

    def validation(self, loader: Iterable[T], *, limit: int | None = None) -> Iterator[T]:
        """Yield the batches of a validation, which a signal to stop cuts short after any of them.

        Then the state after the last step is saved, with the random states that the validation began with, so a resume
        runs the validation again. Do not use it while the model has other weights than the training's (an exponential
        moving average, a schedule-free optimizer in its evaluation mode): they would be saved. Iterate over the loader
        itself there, and the signal waits for the next boundary.

        With several processes all of them call this, and all take their batches to the end; their numbers may differ.

        Args:
            loader: The validation's data.
            limit: Batches that the validation has at most.

        Raises:
            StopTraining: If a signal asked for the end; the ``with`` block catches it.
        """
        self._check_entered()
        self._interruption.workers.cover(loader)
        return self._interruption.validated(loader, limit)

    def step(self, metrics: Mapping[str, Any] = _NOTHING) -> Decision:
        """Report that a step is done: the boundary where saves, rescues and stops happen.

        Call it last in the loop's body, after optimizer and scheduler; with accumulated gradients after each update.
        While an optimizer of accelerate accumulates gradients, this does nothing: no step is done.

        Args:
            metrics: The metrics of this step.

        Returns:
            The decision, with its reason.

        Raises:
            StopTraining: If a signal asked for the end; the ``with`` block catches it.
            SaveError: If a checkpoint could not be written.
        """
        position, requests = self._position, self._requests
        if self._accumulates is not None and self._accumulates():
            return _ACCUMULATING
        position.step += 1
        position.data.used = position.data.given
        position.is_within_step = False
        self._metrics, self._reported = metrics, _NO_NAMES
        if requests.stop is None:  # As `_observe`, without a call.
            decision = self._saver.observe(metrics, position.step, position.epoch, epoch_end=False)
        else:
            decision = self._observe(metrics, position.epoch)
        if position.step >= self._check_at or self._is_held:
            self._check_use(decision)
        # Several ranks always have to agree.
        if requests.is_pending or not self._is_alone or time.monotonic() >= requests.look_at:
            self._interruption.attend()
        return decision

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Report metrics of the state after the last step, such as a validation's loss.

        It is a boundary of its own, so call it last, after `step`. After an epoch's last batch it counts for the
        checkpoint of this step, or for the one that the end of the epoch makes. With several processes all call it.

        With a schedule-free optimizer it ranks a checkpoint only if that is saved between ``optimizer.eval()`` and
        ``optimizer.train()``: otherwise the checkpoint has other weights than were measured.
        """
        position = self._position
        if position.is_within_step:
            msg = f"report() between two boundaries: call step() first, or pass {', '.join(metrics)} to step()"
            raise ObservationError(msg)
        is_unstepped = self._is_in_epochs and position.is_unstepped
        self._add(metrics, anew=is_unstepped and not self._is_held)
        last = self._saver.last
        is_saved = last is not None and (last.step, last.kind) == (position.step, "regular") and not is_unstepped
        # After the last batch no new checkpoint is saved: a resume would run the rest of the epoch's body again.
        self._is_held = self._is_in_epochs and not self._is_feeding and not is_saved
        if not self._is_held:
            self._observe(self._measured(), position.epoch)

    def _observe(self, metrics: Mapping[str, Any], epoch: int, *, epoch_end: bool = False, due: str = "") -> Decision:
        if not self._interruption.may_save():
            return Skip(reason="a signal came, and the save before this one does not end within the grace")
        return self._saver.observe(metrics, self._position.step, epoch, epoch_end=epoch_end, due=due)

    def _add(self, metrics: Mapping[str, Any], *, anew: bool) -> None:
        if anew:  # The metrics are of the epoch before.
            self._metrics, self._reported = _NOTHING, _NO_NAMES
        self._metrics, self._reported = {**self._metrics, **metrics}, self._reported | metrics.keys()

    def _measured(self) -> Mapping[str, Any]:
        return self._training.measured.rename(self._metrics, self._reported, step=self._position.step)

    def _end_epoch(self, metrics: Mapping[str, Any] = _NOTHING) -> Decision:
        position, training = self._position, self._training
        self._add(metrics, anew=position.is_unstepped and not self._is_held)
        self._is_held = self._is_feeding = False
        epoch = position.end_epoch()
        decision = self._observe(self._measured(), epoch, epoch_end=True)
        if decision and training.left_over and not self._has_warned_of_left_over:
            self._has_warned_of_left_over = True
            self._warn(
                f"epoch {epoch} ended {training.left_over} batches after its last step(), and a checkpoint does not "
                "hold the gradients of those: a resume from here loses them. Update with what is left at the end of an "
                "epoch and call step(), or let an epoch be a multiple of the batches of a step (limit=)"
            )
        self._interruption.attend()
        return decision

    def _check_use(self, decision: Decision) -> None:
        """Warn of a report that the loop could not use, and of a policy that cannot save anything in this loop."""
        at = self.progress
        if self._is_held:
            self._is_held = False
            self._warn(
                f"a report in epoch {at.epoch} was followed by another step, and was not used: take the batches from "
                "loop.batches(), or pass the metrics to step()"
            )
        if at.step < self._check_at:
            return
        self._check_at = math.inf
        if self._is_in_epochs and not self._position.is_fed:
            self._warn(
                f"{at.source} was saved after batch {at.batch} of epoch {at.epoch}, and this step's batch did not come "
                "from loop.batches(): those batches are trained again. Iterate over loop.batches(loader) instead of "
                "the loader"
            )
        elif not self._is_in_epochs and (why := _why_silent(self._when, decision)):
            self._warn(f"step {at.step}: {why}")

    def _warn(self, msg: str) -> None:
        if self._ranks.rank == 0:
            warn(msg)

    # Going on

    def resume(
        self,
        from_: str | int | os.PathLike[str] | None = None,
        *,
        map: StateMap = _NOTHING,
        strict: bool = True,
        weights_only: bool = True,
    ) -> LoopProgress:
        """Go on with the newest valid checkpoint, if the directory has one, and return the place of the training.

        If ``checkpointer adopt`` made the record of this checkpoint, another program wrote the checkpoint. Then its
        weights are loaded, step and epoch are those of the record, and a warning lists the objects that begin anew.

        Args:
            from_: None or ``"last"`` for the newest, ``"best"``, a name, or a step. Or the path or URL of a checkpoint
                or directory elsewhere, to begin with its state. Once this directory has checkpoints, the path or URL is
                ignored.
            map: For a file at ``from_`` that another program has saved: where the file has the state of each object,
                such as ``{"model": "state_dict", "optimizer": "optimizer_states.0", "epoch": "epoch"}``. Or a function
                that takes the content of the file, and returns such states. If ``from_`` is a folder, each value of the
                map begins with the name of a file in the folder, such as ``"optimizer.pt"``. ``"epoch"`` is the next
                epoch (0-based), ``"step"`` the number of finished steps. If the map does not name them, those of an
                adopted record are taken, and 0 if there is no such record. Other objects in the file, such as a
                Namespace, are not unpickled. They raise an error only if the map names them.
            strict: If True, every object and the loader passed to `batches` must fit the checkpoint. False loads the
                states that fit, and warns about the others.
            weights_only: Unpickle only plain data; pass False only for a file you trust.

        Raises:
            MismatchError: If the checkpoint is of other objects; it lists them, and nothing was loaded.
            NotFoundError: If neither a checkpoint nor a path has that name.
            RestoreError: As for `CheckpointManager.restore`.
        """
        if not self._source.resume(from_, map, strict=strict, weights_only=weights_only):
            return self.progress
        self._metrics, self._reported = _NOTHING, _NO_NAMES
        self._start = self._position.step
        if math.isfinite(self._check_at):
            self._check_at = self._start + _SILENT_STEPS
        return self.progress

    # Beginning and end

    def __enter__(self) -> Loop:
        self._interruption.listen()
        self._is_entered = True
        self._training.begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> bool:
        try:
            self._interruption.finish(error, self._end)
        finally:
            self._is_entered = False
            self._interruption.leave()
            if self._own_ranks is not None:
                self._own_ranks.close()
        return self._interruption.deliver(error)

    def _end(self) -> None:
        """Save the state at the end of the training, which may be a break, if a rule keeps it."""
        position = self._position
        if position.step == self._start:
            return
        if position.is_within_step:
            if self._saver.last is None or self._saver.last.step < position.step:
                _log.warning(
                    "left within step %d, so that the state after step %d is not saved: leave the loop after step()",
                    *(position.step + 1, position.step),
                )
            return
        ended = position.is_unstepped
        decision = self._observe(self._measured(), position.epoch - ended, epoch_end=ended, due="the training ends")
        if self._saver.last is None and math.isfinite(self._check_at):
            self._check_at = position.step
            self._check_use(decision)

    def _check_entered(self) -> None:
        if not self._is_entered:
            msg = "the loop was not entered; use it as a context manager: with Loop(...) as loop:"
            raise ObservationError(msg)

    def __repr__(self) -> str:
        return f"<Loop at {self.progress}, saves {self._training.summary}: {self._saver!r}>"


def _why_silent(when: Trigger, decision: Decision) -> str:
    """Return why nothing is saved in a loop without epochs, after the newest decision; empty if the policy can save."""
    horizon = horizon_of(when, Progress())
    if horizon.epochs < math.inf and horizon.step == horizon.time == math.inf:
        return (
            f"no epoch has ended, but the policy saves at the end of epochs alone (save {when}): use EverySteps(n), "
            "take the epochs from loop.epochs(), or call loop.end_epoch()"
        )
    if isinstance(decision, Skip) and decision.waiting:
        return f"nothing is saved: {decision.reason}; pass the metric to loop.step() or loop.report()"
    return ""
