"""The state of a whole training: its objects, its random numbers, its place in the data, its counts."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from checkpointer import CheckpointerWarning
from checkpointer.errors import MismatchError, ObservationError, PolicyError
from checkpointer.ports import Ranks
from checkpointer_torch.differences import Differences
from checkpointer_torch.feeding import Feed
from checkpointer_torch.finding import Resumed
from checkpointer_torch.loaders import is_indexed, samplers, torch_loader
from checkpointer_torch.parts import ModulePart, OptimizerPart, Part, StatefulPart, part_of
from checkpointer_torch.progress import Progress
from checkpointer_torch.random_state import put_random_state, take_random_state

__all__ = ["KEY", "Training"]

KEY: Final = "loop"
"""What is the loop's own lies under this key, beside the objects."""
SCHEMA: Final = 1


class Training:
    """Takes and puts back all that an exact resume needs.

    Args:
        objects: What the training consists of, by name.
        ranks: The processes: random numbers and the place in the data are each one's own.
    """

    def __init__(self, objects: Mapping[str, Any], ranks: Ranks) -> None:
        if KEY in objects:
            msg = f"an object is called {KEY!r}, where the loop keeps what is its own; give it another name"
            raise PolicyError(msg)
        self.values: dict[str, Any] = {}
        self._parts: dict[str, Part] = {}
        self._loaders: dict[str, Part] = {}
        for name, thing in objects.items():
            part = part_of(name, thing, self.values)
            (self._parts if torch_loader(thing) is None else self._loaders)[name] = part
        self._samplers = [thing for thing in objects.values() if hasattr(thing, "set_epoch")]
        self._ranks = ranks
        self._feed = Feed()
        self.epoch = self.step = self.used = self.given = 0
        self.is_within_step = False
        self.source = ""
        self._is_accumulating = False
        self._left_over = (0, 0)

    @property
    def progress(self) -> Progress:
        """Where the training is."""
        return Progress(epoch=self.epoch, step=self.step, batch=self.used, source=self.source)

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Return what this epoch has left of its batches."""
        for sampler in self._samplers:
            sampler.set_epoch(self.epoch)
        self._check_samplers(loader)
        self.given = self.used = self._feed.settle(loader, self.used)
        return self._feed.begin(loader, epoch=self.epoch, used=self.used)

    def _check_samplers(self, loader: Any) -> None:
        """Refuse a sampler that would be wound forward twice: by its own state, and by the loader's place."""
        if is_indexed(loader):
            within = samplers(loader)
            for name, part in self._parts.items():
                if isinstance(part, StatefulPart) and any(part.stateful is sampler for sampler in within):
                    msg = (
                        f"{name} is the sampler of the loader that batches() was given, and has a state of its own, so "
                        "that a resume would go on from its place twice; give the Loop the loader alone, or use "
                        "torchdata.StatefulDataLoader"
                    )
                    raise ObservationError(msg)

    def give(self) -> None:
        """Note that a batch is given."""
        if self.given > self.used:
            self._is_accumulating = True  # The batch before had no step of its own.
        self.given += 1
        self.is_within_step = True

    def run_out(self, loader: Any) -> None:
        """Note that the loader has no more batches for this epoch.

        Raises:
            ObservationError: If it had none at all.
        """
        self._feed.run_out()
        if not self.given:
            msg = (
                f"epoch {self.epoch} has no batches: {type(loader).__name__} gave none. An iterator or generator that "
                "was used up by an epoch before cannot begin anew; give batches() a loader, or a new one each epoch"
            )
            raise ObservationError(msg)

    def end_epoch(self) -> int:
        """Go on to the next epoch, and return the one that has ended."""
        self._feed.end(self.given)
        self._left_over = (self.given - self.used, self.step) if self._is_accumulating else (0, 0)
        self.used = self.given = 0
        self.is_within_step = False
        self.epoch += 1
        return self.epoch - 1

    @property
    def left_over(self) -> int:
        """Batches of the epoch that has just ended whose gradients are in no step."""
        count, step = self._left_over
        modules = [part.module for part in self._parts.values() if isinstance(part, ModulePart)]
        has_gradients = any(one.grad is not None for module in modules for one in module.parameters())
        return count if step == self.step and has_gradients else 0

    # Taking

    def take(self) -> dict[str, Any]:
        """Return the whole state. On several processes all of them come here."""
        own = {
            "random": take_random_state(),
            "feed": self._feed.take(),
            "loaders": {name: part.take() for name, part in self._loaders.items()},
        }
        state = {name: part.take() for name, part in self._parts.items()}
        state[KEY] = {
            "schema": SCHEMA,
            "epoch": self.epoch,
            "step": self.step,
            "batch": self.used,
            "exact": not self.is_within_step,
            "left_over": self.left_over,
            "ranks": self._ranks.gather(own),
        }
        return state

    def weights(self) -> dict[str, Any]:
        """Return the modules' states alone; of several modules each under its name."""
        modules = {name: part for name, part in self._parts.items() if isinstance(part, ModulePart)}
        if len(modules) == 1:
            return dict(next(iter(modules.values())).take())
        return {f"{name}.{key}": value for name, part in modules.items() for key, value in part.take().items()}

    # Putting back

    def put(self, state: Any, source: str, *, strict: bool) -> Differences:
        """Take a state over and return how it differs.

        Raises:
            MismatchError: If it differs and ``strict`` is true; then nothing was changed.
        """
        if not isinstance(state, Mapping) or not isinstance(state.get(KEY), Mapping):
            msg = (
                f"{source} was not saved by a Loop, and does not say how far the training was; to start from its "
                "weights alone call load_weights(model, source)"
            )
            raise MismatchError(msg)
        own = state[KEY]
        if own.get("schema") != SCHEMA:
            msg = f"{source} is of a newer version (schema {own.get('schema')!r}, known: {SCHEMA}); update this library"
            raise MismatchError(msg)
        differences = self._compare(state)
        if differences and strict:
            msg = (
                f"{source} does not fit this training, and nothing was loaded: {differences}. Give the loop the "
                "objects it was saved with, or pass strict=False to take what fits"
            )
            raise MismatchError(msg)
        self._put_parts({name: state[name] for name in self._parts if name in state})
        self.epoch, self.step, self.used = own["epoch"], own["step"], own["batch"]
        self.given, self.is_within_step, self.source = self.used, False, source
        self._put_own(own["ranks"], strict=strict)
        if own.get("left_over"):
            msg = (
                f"{source} was saved at the end of an epoch, and the gradients of its last {own['left_over']} batches "
                "are not in it: the next step is without them"
            )
            warnings.warn(msg, CheckpointerWarning, stacklevel=3)
        if not own["exact"]:
            msg = (
                f"{source} was saved when an exception struck within step {self.step + 1}: what that step had "
                "changed is in it, and it is taken again. Resume from a step before to be exact"
            )
            warnings.warn(msg, CheckpointerWarning, stacklevel=3)
        return differences

    def _compare(self, state: Mapping[str, Any]) -> Differences:
        loaders = {name for of_rank in state[KEY]["ranks"] for name in of_rank["loaders"]}
        there = {name for name in state if name != KEY} | loaders
        here = {**self._parts, **self._loaders}
        differences = Differences(
            missing=tuple(name for name in here if name not in there),
            unexpected=tuple(sorted(there - set(here))),
        )
        for name, part in self._parts.items():
            if name in state:
                differences += part.compare(state[name]).within(name)
        return differences

    def _put_parts(self, states: Mapping[str, Any]) -> None:
        """Put those first that may refuse their state: what they had before is small enough to go back to it."""
        large = (ModulePart, OptimizerPart)
        order = sorted(states, key=lambda name: isinstance(self._parts[name], large))
        done = []
        for name in order:
            part = self._parts[name]
            if not isinstance(part, large):
                done.append((part, copy.deepcopy(part.take())))
            try:
                part.put(states[name])
            except Exception as error:
                for earlier, before in done:
                    with contextlib.suppress(Exception):  # It may be the very one that refuses.
                        earlier.put(before)
                msg = f"{name} refuses its state ({type(error).__name__}: {error}); nothing was loaded"
                raise MismatchError(msg) from error

    def _put_own(self, ranks: list[Mapping[str, Any]], *, strict: bool) -> None:
        saved, here = len(ranks), self._ranks.size
        rank = self._ranks.rank
        own = ranks[rank % saved]
        if saved != here:
            self.used = self.given = self.used * saved // here
            msg = (
                f"saved by {saved} processes, resumed by {here}: each goes on after {self.used} of its batches, and "
                "the random numbers are others; not exact"
            )
            warnings.warn(msg, CheckpointerWarning, stacklevel=4)
        if rank < saved:
            put_random_state(own["random"])
        for name, part in self._loaders.items():
            if name in own["loaders"]:
                part.put(own["loaders"][name])
        random = own["random"] if rank < saved else None
        is_other = saved != here
        origin = Resumed(source=self.source, is_strict=strict, is_of_other_ranks=is_other, random=random)
        self._feed.put(own["feed"], origin)
