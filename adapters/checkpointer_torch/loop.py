"""The loop: what a hand-written training calls to be saved, resumed exactly, and stopped in time."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Final, TypeVar

import torch.distributed as dist

from checkpointer import CheckpointerWarning, CheckpointManager, Decision, Listener, Policy, Record
from checkpointer.distributed.manager import DistributedManager
from checkpointer.distributed.ranks import Agreement, OneRank, TorchRanks
from checkpointer.errors import ObservationError, PolicyError, RanksError
from checkpointer.hosts.grace import Grace
from checkpointer.hosts.loader_workers import Workers, deliver
from checkpointer.manager import MANAGER_OPTIONS, check_options
from checkpointer.ports import Ranks, Storage
from checkpointer_torch.adopted_checkpoint import begin_from_adopted
from checkpointer_torch.foreign_file import StateMap
from checkpointer_torch.loader_facts import Calls, put_loader, take_loader
from checkpointer_torch.loop_progress import Progress
from checkpointer_torch.never_due import why_silent
from checkpointer_torch.open_any import request_file
from checkpointer_torch.random_state import put_random_state, take_random_state
from checkpointer_torch.resume_source import find_origin
from checkpointer_torch.signals import SAVE_ON, STOP_ON, Asked, Requests, StopTraining
from checkpointer_torch.training_state import Training

__all__ = ["Loop"]

_log: Final = logging.getLogger("checkpointer.torch")
_NOTHING: Final[Mapping[str, Any]] = {}
_END: Final[Any] = object()
_SET_BY_LOOP: Final = ("state", "weights", "save")
"""Arguments of `CheckpointManager` that the loop sets itself."""
_SILENT_STEPS: Final = 1000
"""After so many steps without an epoch the loop looks whether its policy can save anything."""
T = TypeVar("T")


class Loop:
    """Wraps a training loop: it is saved by a policy, resumed exactly, and stopped by signals at a step boundary.

    Everything whose state matters is given by name: modules, optimizers, schedulers, scalers, averages, anything with
    ``state_dict``, loaders, random generators, tensors, dicts, dataclasses, namespaces and plain values (then
    ``loop["name"]``). A value that the program binds anew is given as a function, ``hidden=lambda: hidden``: it is
    called at each save, and ``loop["hidden"]`` returns the value that a resume has put back. The random states of
    python, numpy, torch and CUDA are always saved, and so is the place in the data. The ``repr`` lists all of it.

    Use it as a context manager. A signal is delayed until the next step boundary, where a rescue is saved; the
    ``with`` block ends there, and the signal goes on to whoever had it before: by default it ends the process. An
    exception makes a rescue too, and passes unchanged.

    Args:
        directory: As for `CheckpointManager`.
        policy: When to save and what to keep.
        options: What else `CheckpointManager` takes, such as ``{"trust": key, "mirror": url}``.
        config: The settings of the training: a dict, an ``argparse.Namespace``, a dataclass. They are saved, and
            compared at a resume, where each difference is logged. They are never put back; `read_config` reads them.
        ranks: The processes of the training; None takes those of ``torch.distributed``, if it is initialised.
        stop_on: Signals that end the training.
        save_on: Signals that ask for a save, without an end.
        grace_s: Seconds between a signal and the kill that follows it, if that is known: a rescue that may be too
            late says so, and after it no rank waits for the writer thread or the mirror any longer.
        **objects: The state of the training.

    Raises:
        PolicyError: If nothing of an object can be saved, if it is called as an option of `CheckpointManager` is, for
            an unknown option, or for a format of sharded state.
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
        Progress(epoch=2, step=6, batch=0, source='')
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
        _check_names(objects, options)
        if options.get("format") == "dcp":
            msg = (
                "a Loop saves state that all ranks have alike; for sharded models call DistributedManager(format='dcp')"
            )
            raise PolicyError(msg)
        self._own_ranks = TorchRanks() if ranks is None and _is_distributed() else None
        self._ranks: Ranks = self._own_ranks or ranks or OneRank()
        self._is_alone = self._ranks.size == 1
        self._training = training = Training(objects, self._ranks, config)
        self._directory = directory
        self._options = options
        self._stopwatch = _Stopwatch(training)
        kept = {**options, "weights": training.weights}
        kept["listeners"] = (*options.get("listeners", ()), self._stopwatch)
        self._saver: CheckpointManager | DistributedManager
        if self._is_alone:
            self._saver = CheckpointManager(directory, policy, state=self._stopwatch.take, **kept)
        else:
            self._saver = DistributedManager(directory, policy, ranks=self._ranks, state=self._stopwatch.take, **kept)
        file = request_file(directory) if self._ranks.rank == 0 else None
        self._requests = requests = Requests(stop_on, save_on, file)
        self._is_fetching = False
        # An error within a fetch changes nothing: the training is at a boundary.
        self._workers = Workers(requests.signals, lambda: requests.unanswered is not None and not self._is_fetching)
        self._agree = Agreement(self._ranks)
        self._grace = Grace(grace_s)
        self._metrics: Mapping[str, Any] = _NOTHING
        self._reported: frozenset[str] = frozenset()
        self._when = policy.when
        self._start = self._epoch_began_at = 0
        self._epoch_ended_at = -1
        self._silent_until: float = _SILENT_STEPS
        """At this step the loop looks whether its policy can save anything; it has no epochs so far."""
        self._is_entered = self._is_feeding = self._is_fed = False
        self._is_in_epochs = self._is_held = self._has_warned = False
        self.stopped = ""
        """Why the training was stopped at a boundary; empty if it was not."""
        self._stop_signal: int | None = None

    # The training

    @property
    def progress(self) -> Progress:
        """Where the training is."""
        return self._training.progress

    @property
    def manager(self) -> CheckpointManager:
        """What decides and saves. Of several processes only rank 0 has one; `best` and `last` are known to all.

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
        """The settings as they are saved: a copy of what was given as ``config=``, as plain data."""
        return copy.deepcopy(self._training.config)

    def __getitem__(self, name: str) -> Any:
        """Return a plain value that was given by this name, or a function's: what a resume has put back, if it has."""
        return self._training.value(name)

    def __setitem__(self, name: str, value: Any) -> None:
        self._training.set_value(name, value)

    def epochs(self, count: int | None = None) -> Iterator[int]:
        """Yield the index of each epoch that is left. When the body is through, the epoch has ended.

        An epoch that was left off within is yielded again: `batches` then has those left. An epoch without `step`
        counts as one step.

        Args:
            count: How many the training has in all; None goes on until a ``break``.
        """
        training = self._training
        self._check_entered()
        # At the first step of an epoch that was left off within, the loop looks whether `batches` was called.
        self._silent_until = training.step if training.used else math.inf
        self._is_in_epochs = True
        try:
            while count is None or self._training.epoch < count:
                self._training.unfed_since = self._training.step
                yield self._training.epoch
                self._training.unfed_since = None
                self._end_epoch()
        finally:
            self._is_in_epochs = False

    def end_epoch(self, metrics: Mapping[str, Any] = _NOTHING) -> Decision:
        """Report that an epoch has ended, for a loop that is driven by events or has no `epochs`.

        Args:
            metrics: What was measured of the state after the epoch.

        Returns:
            What was decided, with its reason.

        Raises:
            ObservationError: Within `epochs`, which ends its epochs itself.
            StopTraining: If a signal asked for the end.
            SaveError: If a checkpoint could not be written.
        """
        self._check_entered()
        if self._is_in_epochs:
            msg = "end_epoch() within epochs(), which ends the epoch itself when the body is through; leave it out"
            raise ObservationError(msg)
        self._silent_until = math.inf
        return self._end_epoch(metrics)

    def steps(self, count: int | None = None) -> Iterator[int]:
        """Yield the index of each step that is left, for a training by iterations.

        The body ends with `step`. A body without `step` counts as a step too. A validation that draws random numbers,
        or changes what is saved, comes before `step`, which is given its metrics; another one may also `report` after
        it. Leave the loop after `step`: the state within a step is not saved.

        Args:
            count: How many the training has in all; None goes on until a ``break``.
        """
        training = self._training
        self._check_entered()
        while count is None or training.step < count:
            training.is_within_step = True
            before = training.step
            yield before
            if training.step == before:
                self.step()

    def batches(self, loader: Iterable[T] | Callable[[], T], *, limit: int | None = None) -> Iterator[T]:
        """Yield the batches of this epoch, once per epoch; after a resume those that are left.

        A ``DataLoader`` with an index skips what was used without reading it; a loader with a ``state_dict`` goes on
        by itself; anything else is read again up to the place. ``set_epoch`` of the loader, its samplers and its
        dataset is called.

        Args:
            loader: The training's data: a loader, any other iterable, or a function that returns a batch. The
                function has no place but the random states, or a ``state_dict`` of its own; give it a ``limit``.
            limit: Batches that an epoch has at most; None goes on until the loader ends.

        Raises:
            ObservationError: If the epoch has had its pass through the data, or the loader has no batches.
            MismatchError: If a place of this loader cannot be restored, or it is not the loader that was left: it has
                another length, batch size, sampler or number of workers. ``resume(strict=False)`` warns instead.
        """
        self._check_entered()
        if self._is_fed:
            msg = f"epoch {self._training.epoch} had its batches already; for a validation call loop.validation(loader)"
            raise ObservationError(msg)
        self._is_fed = True
        self._training.unfed_since = None
        if not isinstance(loader, Iterable):
            loader = Calls(loader)
        return self._fed(loader, math.inf if limit is None else limit)

    def _fed(self, loader: Iterable[T], limit: float) -> Iterator[T]:
        training, requests = self._training, self._requests
        self._is_feeding = True
        self._attend_alone()
        self._workers.cover(loader)
        # A pass that has had its limit is not begun: a generator would read a batch.
        batches = training.batches(loader) if training.used < limit else iter(())
        try:
            while training.given < limit:
                batch = self._fetch(batches, self._attend_alone)
                if batch is _END:
                    training.run_out(loader)
                    break
                training.give()
                yield batch
                if requests.some:
                    self._attend_alone()
        finally:
            self._is_feeding = False

    def _fetch(self, batches: Iterator[T], attend: Callable[[], object]) -> T:
        self._is_fetching = self._is_alone
        try:
            return next(batches, _END)
        except Exception:
            # The signal may have ended the loader's workers; other ranks are not at this place.
            if self._is_alone:
                attend()
            raise
        finally:
            self._is_fetching = False

    def validation(self, loader: Iterable[T], *, limit: int | None = None) -> Iterator[T]:
        """Yield the batches of a validation, which a signal to stop cuts short after any of them.

        The state that is saved then is that after the last step, with the random states that the validation began
        with, so a resume runs the validation again. Do not use it while the weights are others than the training's
        (an exponential moving average, a schedule-free optimizer in its evaluation mode): they would be saved.
        Iterate over the loader itself there, and the signal waits for the next boundary.

        On several processes all of them call this, and all take their batches to the end; their numbers may differ.

        Args:
            loader: The validation's data.
            limit: Batches that the validation has at most.

        Raises:
            StopTraining: If a signal asked for the end; the ``with`` block catches it.
        """
        self._check_entered()
        self._workers.cover(loader)
        return self._validated(loader, limit)

    def _validated(self, loader: Iterable[T], limit: int | None) -> Iterator[T]:
        random, own = take_random_state(), take_loader(loader)
        agreement = Agreement(self._ranks)

        def attend(*, is_done: bool = False) -> bool:
            stops = self._requests.unanswered is not None and not self._training.is_within_step
            if not agreement(stops or is_done):
                return False
            ranks = self._ranks.gather((stops, is_done))
            if any(stops for stops, _ in ranks):
                put_random_state(random)
                put_loader(loader, own)
                self._answer()
            return all(is_done for _, is_done in ranks)

        batches = itertools.islice(loader, limit)
        while (batch := self._fetch(batches, attend)) is not _END:
            yield batch
            attend()
        while not attend(is_done=True):
            pass  # Another rank has more batches, and all have to stop at the same place.

    def step(self, metrics: Mapping[str, Any] = _NOTHING) -> Decision:
        """Report that a step is done: the boundary where saves, rescues and stops happen.

        Call it last in the loop's body, after optimizer and scheduler; with accumulated gradients after each update.

        Args:
            metrics: What was measured at this step.

        Returns:
            What was decided, with its reason.

        Raises:
            StopTraining: If a signal asked for the end; the ``with`` block catches it.
            SaveError: If a checkpoint could not be written.
        """
        training = self._training
        training.step += 1
        training.used = training.given
        training.is_within_step = False
        self._metrics, self._reported = metrics, frozenset()
        decision = self._saver.observe(metrics, training.step, training.epoch, epoch_end=False)
        if training.step >= self._silent_until or self._is_held:
            self._speak_up(decision)
        if not self._is_alone or self._requests.some or time.monotonic() >= self._requests.look_at:
            self._attend()
        return decision

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Report what was measured of the state after the last step, such as a validation's loss.

        It is a boundary of its own, so call it last, after `step`. After an epoch's last batch it counts for the
        checkpoint of this step, or for the one that the end of the epoch makes. On several processes all call it.

        With a schedule-free optimizer it ranks a checkpoint only if that is saved between ``optimizer.eval()`` and
        ``optimizer.train()``: otherwise the checkpoint has other weights than were measured.
        """
        training = self._training
        if training.is_within_step:
            msg = f"report() between two boundaries: call step() first, or pass {', '.join(metrics)} to step()"
            raise ObservationError(msg)
        is_unstepped = self._is_in_epochs and self._is_unstepped
        self._add(metrics, anew=is_unstepped and not self._is_held)
        last = self._saver.last
        is_saved = last is not None and (last.step, last.kind) == (training.step, "regular") and not is_unstepped
        # After the last batch nothing is saved anew: a resume would run the rest of the epoch's body again.
        self._is_held = self._is_in_epochs and not self._is_feeding and not is_saved
        if not self._is_held:
            self._saver.observe(self._measured(), training.step, training.epoch, epoch_end=False)

    def _add(self, metrics: Mapping[str, Any], *, anew: bool) -> None:
        if anew:  # The metrics are of the epoch before.
            self._metrics, self._reported = _NOTHING, frozenset()
        self._metrics, self._reported = {**self._metrics, **metrics}, self._reported | metrics.keys()

    def _measured(self) -> Mapping[str, Any]:
        return self._training.swapping.told_apart(self._metrics, self._reported, step=self._training.step)

    @property
    def _is_unstepped(self) -> bool:
        """Whether the epoch has had no step so far."""
        return self._training.step == self._epoch_began_at and not self._training.used

    def _end_epoch(self, metrics: Mapping[str, Any] = _NOTHING) -> Decision:
        training = self._training
        self._add(metrics, anew=self._is_unstepped and not self._is_held)
        if self._is_unstepped and (training.given or not self._is_fed):
            training.step += 1  # Else every epoch would be saved as the same step.
            training.used = training.given
        self._is_held = False
        epoch = training.end_epoch()
        self._epoch_ended_at = self._epoch_began_at = training.step
        self._is_feeding = self._is_fed = False
        decision = self._saver.observe(self._measured(), training.step, epoch, epoch_end=True)
        if decision and training.left_over:
            self._warn_of_left_over(epoch)
        self._attend()
        return decision

    def _speak_up(self, decision: Decision) -> None:
        """Warn of a report that the loop could not use, and of a policy that cannot save anything in this loop."""
        if self._is_held:
            self._is_held = False
            msg = (
                f"a report in epoch {self._training.epoch} was followed by another step, and was not used: take the "
                "batches from loop.batches(), or pass the metrics to step()"
            )
            warnings.warn(msg, CheckpointerWarning, stacklevel=3)
        if self._training.step >= self._silent_until:
            self._silent_until = math.inf
            if self._is_in_epochs:
                self._warn_of_unfed()
                return
            why = why_silent(self._when, decision)
            if why and self._ranks.rank == 0:
                warnings.warn(f"step {self._training.step}: {why}", CheckpointerWarning, stacklevel=3)

    def _warn_of_unfed(self) -> None:
        if self._is_fed or self._ranks.rank != 0:
            return
        msg = (
            f"{self._training.source} was saved after batch {self._training.used} of epoch {self._training.epoch}, and "
            "this step's batch did not come from loop.batches(): those batches are trained again. Iterate over "
            "loop.batches(loader) instead of the loader"
        )
        warnings.warn(msg, CheckpointerWarning, stacklevel=4)

    def _warn_of_left_over(self, epoch: int) -> None:
        if self._has_warned or self._ranks.rank != 0:
            return
        self._has_warned = True
        msg = (
            f"epoch {epoch} ended {self._training.left_over} batches after its last step(), and a checkpoint does not "
            "hold the gradients of those: a resume from here loses them. Update with what is left at the end of an "
            "epoch and call step(), or let an epoch be a multiple of the batches of a step (limit=)"
        )
        warnings.warn(msg, CheckpointerWarning, stacklevel=5)

    # Going on

    def resume(
        self,
        from_: str | int | os.PathLike[str] | None = None,
        *,
        map: StateMap = _NOTHING,
        strict: bool = True,
        weights_only: bool = True,
    ) -> Progress:
        """Go on with the newest valid checkpoint, if there is any, and return where the training is.

        If ``checkpointer adopt`` made its record, another program wrote it: its weights are loaded, step and epoch are
        those of the record, and a warning says what begins anew.

        Args:
            from_: None or ``"last"`` for the newest, ``"best"``, a name, a step; or the path or URL of a checkpoint or
                directory elsewhere: that starts this directory, and is not looked at once this has checkpoints.
            map: For a file at ``from_`` that another program has saved: the key of each object's state in it, such as
                ``{"model": "state_dict", "optimizer": "optimizer", "epoch": "epoch"}``, or a function of what the file
                holds. ``"epoch"`` is the next epoch (0-based), ``"step"`` counts finished steps; 0 without them. Other
                objects in the file, such as a Namespace, are not unpickled, and refused only if the map names them.
            strict: Whether every object must fit, and the data that `batches` is given; False takes
                what fits, and warns of the rest.
            weights_only: Unpickle nothing but plain data; pass False only for a file you trust.

        Raises:
            MismatchError: If the checkpoint is of other objects; it lists them, and nothing was loaded.
            NotFoundError: If there is neither a checkpoint nor a path of that name.
            RestoreError: As for `CheckpointManager.restore`.
        """
        if (
            not map
            and from_ in (None, "last")
            and begin_from_adopted(
                self._saver, self._training, directory=self._directory, options=self._options, strict=strict
            )
        ):
            return self._resumed()
        origin = find_origin(self._saver, self._directory, from_, is_mapped=bool(map), weights_only=weights_only)
        if origin is None:
            return self.progress
        if map and origin.is_elsewhere:
            differences = self._training.put_foreign(origin.state, map, origin.source, strict=strict)
        else:
            differences = self._training.put(origin.state, origin.source, strict=strict)
        if differences:
            untaken = f"; not loaded at all: {', '.join(differences.untaken)}" if differences.untaken else ""
            msg = f"{origin.source} does not fit, and what did was loaded: {differences}{untaken}"
            warnings.warn(msg, CheckpointerWarning, stacklevel=2)
        return self._resumed()

    def _resumed(self) -> Progress:
        self._metrics, self._reported = _NOTHING, frozenset()
        self._start = self._epoch_began_at = self._training.step
        if math.isfinite(self._silent_until):
            self._silent_until = self._start + _SILENT_STEPS
        return self.progress

    # What is asked from outside

    def _attend(self) -> None:
        requests = self._requests
        if time.monotonic() >= requests.look_at:
            requests.look()
        if self._agree(requests.some):
            self._answer()

    def _attend_alone(self) -> None:
        """Attend at a boundary that other ranks may not be at."""
        if self._is_alone and self._requests.some and not self._training.is_within_step:
            self._attend()

    def _answer(self) -> None:
        """Do what is asked on any rank; all ranks are here."""
        asked = _first(self._ranks.gather(self._requests.take()))
        if asked.stop is not None:
            self._stop(asked.stop)
        if asked.save:
            self._rescue(f"asked for by {asked.save}")
            self._requests.answered()

    def _stop(self, number: int) -> None:
        # Clocks of other hosts differ: a rank that got no signal itself counts from now.
        self._grace.begin(self._requests.since)
        self._check_grace()
        saved = self._rescue(_name(number))
        self._stop_signal = number
        self.stopped = f"{_name(number)} at step {self._training.step}; {saved}"
        _log.warning("stopped by %s", self.stopped)
        raise StopTraining(self.stopped)

    def _check_grace(self) -> None:
        left, took = self._grace.left, self._stopwatch.took_s
        if took is not None and left is not None and left < took and self._ranks.rank == 0:
            msg = (
                f"{left:.1f} s are left of the grace of {self._grace.seconds:g} s, and the last save took "
                f"{took:.1f} s: the rescue may be cut off, and then the run goes on from the checkpoint before it"
            )
            warnings.warn(msg, CheckpointerWarning, stacklevel=5)

    def _rescue(self, reason: str) -> str:
        try:
            decision = self._saver.rescue(reason, timeout=self._grace.left)
        except Exception as error:  # Older checkpoints hold, and whoever asked has to have an answer.
            msg = f"the save asked for by {reason} failed ({error!r}); older checkpoints are untouched"
            warnings.warn(msg, CheckpointerWarning, stacklevel=5)
            return msg
        what = f"saved as {decision.name}" if hasattr(decision, "name") else decision.reason
        _log.info("%s: %s", reason, what)
        return what

    # Beginning and end

    def __enter__(self) -> Loop:
        self._requests.listen()
        self._workers.listen()
        self._is_entered = True
        self._training.begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> bool:
        is_stop = isinstance(error, StopTraining)
        is_immediate = isinstance(error, KeyboardInterrupt) and self._requests.was_immediate
        number = self._stop_signal if is_stop else self._requests.unanswered
        try:
            self._finish(None if is_stop or is_immediate else error, has_ended=error is None)
        finally:
            self._is_entered = False
            self._requests.give_back()
            self._workers.leave()
            if self._own_ranks is not None:
                self._own_ranks.close()
        if number is not None and not is_immediate:
            if error is not None and not is_stop:
                # By default the process ends in `deliver`, and the error would not be seen.
                _log.error("%s had come, and then the training failed", _name(number), exc_info=error)
            deliver(number)
        return is_stop

    def _finish(self, error: BaseException | None, *, has_ended: bool) -> None:
        if self._requests.since is not None:
            self._grace.begin(self._requests.since)
        try:
            if has_ended:
                self._end()
            late = self._requests.unanswered if self._stop_signal is None else None
            if late is not None and error is None and self._is_alone and not self._training.is_within_step:
                self._rescue(_name(late))
        except BaseException:
            self._saver.close(timeout=self._grace.left)
            raise
        self._saver.close(error, timeout=self._grace.left)

    def _end(self) -> None:
        """The training has ended, be it by a break: its state is saved if a rule keeps it."""
        training = self._training
        if training.step == self._start:
            return
        if training.is_within_step:
            if self._saver.last is None or self._saver.last.step < training.step:
                _log.warning(
                    "left within step %d, so that the state after step %d is not saved: leave the loop after step()",
                    *(training.step + 1, training.step),
                )
            return
        ended = training.step == self._epoch_ended_at
        epoch = training.epoch - ended
        decision = self._saver.observe(self._measured(), training.step, epoch, epoch_end=ended, due="the training ends")
        if self._saver.last is None and math.isfinite(self._silent_until):
            self._silent_until = training.step
            self._speak_up(decision)

    def _check_entered(self) -> None:
        if not self._is_entered:
            msg = "the loop was not entered; use it as a context manager: with Loop(...) as loop:"
            raise ObservationError(msg)

    def __repr__(self) -> str:
        return f"<Loop at {self.progress}, saves {self._training.plan}: {self._saver!r}>"


class _Stopwatch(Listener):
    """Knows how long the last save took, from taking the state until it was durable."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self._since = 0.0
        self.took_s: float | None = None

    def take(self) -> Any:
        self._since = time.monotonic()
        return self._training.take()

    def on_saved(self, record: Any) -> None:
        self.took_s = time.monotonic() - self._since


def _check_names(objects: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Refuse an object that is called as an option is: it would be saved as state, and the option would do nothing."""
    check_options(options, "Loop", own=_SET_BY_LOOP)
    for name in objects:
        if name in MANAGER_OPTIONS and name != "state":
            how = "the Loop sets it itself" if name in _SET_BY_LOOP else f"pass options={{{name!r}: ...}}"
            msg = f"{name!r} is an option of CheckpointManager: {how}; an object of the training needs another name"
            raise PolicyError(msg)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _first(asked: list[Asked]) -> Asked:
    """Return what all ranks do of what each was asked: a stop goes first."""
    for one in asked:
        if one.stop is not None:
            return one
    return next((one for one in asked if one.save), asked[0])


def _name(number: int) -> str:
    return signal.Signals(number).name
