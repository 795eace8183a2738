"""The state of a whole training: its objects, its random numbers, its place in the data, its counts."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from torch import nn

from checkpointer import CheckpointerWarning, Record
from checkpointer.errors import MismatchError, ObservationError, PolicyError, UnknownValueError
from checkpointer.ports import Ranks
from checkpointer_torch.data_position import Feed
from checkpointer_torch.foreign_file import StateMap, picked
from checkpointer_torch.loader_facts import is_indexed, samplers, torch_loader
from checkpointer_torch.local_values import CarriedPart
from checkpointer_torch.loop_progress import Progress
from checkpointer_torch.mutable_values import MutablePart
from checkpointer_torch.position_search import Resumed
from checkpointer_torch.random_state import put_random_state, take_random_state
from checkpointer_torch.settings import CONFIG, config_differences, plain_config
from checkpointer_torch.state_differences import Differences
from checkpointer_torch.stateful_objects import (
    ModulePart,
    OptimizerPart,
    Part,
    StatefulPart,
    TensorPart,
    described,
    part_of,
)
from checkpointer_torch.swapped_weights import Swapping

__all__ = ["KEY", "Training"]

KEY: Final = "loop"
"""What is the loop's own lies under this key, beside the objects."""
SCHEMA: Final = 1
_log: Final = logging.getLogger("checkpointer.torch")


class Training:
    """Takes and puts back all that an exact resume needs.

    Args:
        objects: What the training consists of, by name.
        ranks: The processes: random numbers, the place in the data, and what functions return are each one's own.
        config: The settings; None for none.
    """

    def __init__(self, objects: Mapping[str, Any], ranks: Ranks, config: Any = None) -> None:
        if KEY in objects:
            msg = f"an object is called {KEY!r}, where the loop keeps what is its own; give it another name"
            raise PolicyError(msg)
        self.config = None if config is None else plain_config(config)
        self.values: dict[str, Any] = {}
        self._parts: dict[str, Part] = {}
        self._loaders: dict[str, Part] = {}
        """What is each process's own: loaders, and functions."""
        plan = []
        for name, thing in objects.items():
            part = part_of(name, thing, self.values)
            is_own = torch_loader(thing) is not None or isinstance(part, CarriedPart)
            (self._loaders if is_own else self._parts)[name] = part
            plan.append(described(thing, name, part))
        self._given = dict(self.values)
        self.plan = ", ".join([*plan, *([CONFIG] if config is not None else []), "random states"])
        """What is saved, in words."""
        self.swapping = Swapping(objects.values())
        self._samplers = [thing for thing in objects.values() if hasattr(thing, "set_epoch")]
        self._ranks = ranks
        self._feed = Feed()
        self.epoch = self.step = self.used = self.given = 0
        self.is_within_step = False
        self.source = ""
        self._is_accumulating = False
        self._left_over = (0, 0)
        self.unfed_since: int | None = None
        """The step at which the epoch began, if the loop does not see its batches."""

    def begin(self) -> None:
        """Log what will be saved, and remember which objects the program refers to."""
        for part in self._parts.values():
            if isinstance(part, (TensorPart, MutablePart)):
                part.held.begin()
        if self._ranks.rank == 0:
            _log.info("saved by this loop: %s", self.plan)

    @property
    def progress(self) -> Progress:
        """Where the training is."""
        return Progress(epoch=self.epoch, step=self.step, batch=self.used, source=self.source)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all objects."""
        return (*self._parts, *self._loaders)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The modules by name."""
        return {name: part.module for name, part in self._parts.items() if isinstance(part, ModulePart)}

    def begin_at(self, record: Record) -> None:
        """Take step and epoch from the record of a checkpoint that no loop wrote."""
        self.step, self.epoch = record.step, record.epoch + record.epoch_end
        self.used = self.given = 0
        self.is_within_step, self.source = False, record.name

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

    # Values

    def value(self, name: str) -> Any:
        """Return a plain value, or what a function returns; after a resume what that has put back."""
        if name in self.values:
            return self.values[name]
        part = self._loaders.get(name)
        if not isinstance(part, CarriedPart):
            raise UnknownValueError(self._no_value(name))
        return part.read()

    def set_value(self, name: str, value: Any) -> None:
        """Replace a plain value. Only what was given is saved: a new name would be lost."""
        if name not in self.values:
            raise UnknownValueError(self._no_value(name))
        self.values[name] = value

    def _no_value(self, name: str) -> str:
        if name in self._loaders or name in self._parts:
            return (
                f"loop[{name!r}] cannot be read or bound anew: {name!r} is an object of the program, and the loop "
                f"holds plain values alone. Change the object in place, or pass {name}=lambda: {name} to the Loop"
            )
        have = ", ".join(self.values) or "none"
        return f"the loop holds no value {name!r} (have: {have}); pass {name}=... to the Loop, so that it is saved"

    # Taking

    def take(self) -> dict[str, Any]:
        """Return the whole state. On several processes all of them come here."""
        own = {
            "random": take_random_state(),
            "feed": self._feed.take(),
            "loaders": {name: part.take() for name, part in self._loaders.items()},
        }
        state: dict[str, Any] = {} if self.config is None else {CONFIG: copy.deepcopy(self.config)}
        state |= {name: part.take() for name, part in self._parts.items()}
        mutable = {name: part for name, part in self._parts.items() if isinstance(part, MutablePart)}
        self.swapping.note(self.step)
        state[KEY] = {
            "schema": SCHEMA,
            "untouched": {name: part.untouched() for name, part in mutable.items()},
            "unchanged": [name for name, value in self._given.items() if value == self.values[name]],
            "epoch": self.epoch,
            "step": self.step,
            "batch": self.used,
            "exact": not self.is_within_step,
            "left_over": self.left_over,
            "unfed": self.unfed_since is not None and self.step > self.unfed_since,
            "ranks": self._ranks.gather(own),
        }
        return state

    def weights(self) -> dict[str, Any]:
        """Return the modules' states alone; of several modules each under its name."""
        self.swapping.note(self.step)
        modules = {name: part for name, part in self._parts.items() if isinstance(part, ModulePart)}
        if len(modules) == 1:
            return dict(next(iter(modules.values())).take())
        return {f"{name}.{key}": value for name, part in modules.items() for key, value in part.take().items()}

    # Putting back

    def put(
        self, state: Any, source: str, *, strict: bool, advice: str = "Give the loop the objects it was saved with"
    ) -> Differences:
        """Take a state over and return how it differs.

        Args:
            state: What was saved.
            source: Its path or URL, for messages.
            strict: Whether a difference is an error.
            advice: What to do about a difference, for the message.

        Raises:
            MismatchError: If it differs and ``strict`` is true; then nothing was changed.
        """
        if not isinstance(state, Mapping) or not isinstance(state.get(KEY), Mapping):
            msg = (
                f"{source} was not saved by a Loop, and does not say how far the training was. To go on from another "
                "program's file pass map={'model': 'its key', 'optimizer': 'its key', 'epoch': 'its key'}; to start "
                "from its weights alone call load_weights(model, source)"
            )
            raise MismatchError(msg)
        own = state[KEY]
        if own.get("schema") != SCHEMA:
            msg = f"{source} is of a newer version (schema {own.get('schema')!r}, known: {SCHEMA}); update this library"
            raise MismatchError(msg)
        states = self._states_in(state)
        differences = self._compare(states)
        if differences and strict:
            msg = (
                f"{source} does not fit this training, and nothing was loaded: {differences}. {advice}, or pass "
                "strict=False to take what fits"
            )
            raise MismatchError(msg)
        self._put_parts(self._settled({name: states[name] for name in self._parts if name in states}, own, source))
        self._log_values(states, own, source)
        self._compare_config(state.get(CONFIG), source)
        self.epoch, self.step, self.used = own["epoch"], own["step"], own["batch"]
        self.given, self.is_within_step, self.source = self.used, False, source
        self._put_own(own["ranks"], states, strict=strict)
        self.swapping.note(self.step)
        if own.get("left_over"):
            msg = (
                f"{source} was saved at the end of an epoch, and the gradients of its last {own['left_over']} batches "
                "are not in it: the next step is without them"
            )
            warnings.warn(msg, CheckpointerWarning, stacklevel=3)
        if own.get("unfed"):
            msg = (
                f"{source} was saved within epoch {self.epoch}, and the batches of its steps did not come from "
                "loop.batches(): the epoch begins again. To go on within it, take them from loop.batches(loader)"
            )
            warnings.warn(msg, CheckpointerWarning, stacklevel=3)
        if not own["exact"]:
            msg = (
                f"{source} was saved when an exception struck within step {self.step + 1}: what that step had "
                "changed is in it, and it is taken again. Resume from a step before to be exact"
            )
            warnings.warn(msg, CheckpointerWarning, stacklevel=3)
        return differences

    def _states_in(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return each object's state, whether it was saved once or by each process."""
        ranks = state[KEY]["ranks"]
        own = ranks[self._ranks.rank % len(ranks)]["loaders"]
        return {**own, **{name: value for name, value in state.items() if name not in (KEY, CONFIG)}}

    def _compare(self, states: Mapping[str, Any]) -> Differences:
        here = {**self._parts, **self._loaders}
        differences = Differences(
            missing=tuple(name for name in here if name not in states),
            unexpected=tuple(sorted(set(states) - set(here))),
        )
        for name, part in self._parts.items():
            if name in states:
                differences += part.compare(states[name]).within(name)
        return differences

    def _settled(self, states: Mapping[str, Any], own: Mapping[str, Any], source: str) -> dict[str, Any]:
        """Return the states with the settings among them that are given otherwise now; each is logged."""
        settled = dict(states)
        for name, untouched in own.get("untouched", {}).items():
            part = self._parts.get(name)
            if isinstance(part, MutablePart) and name in states:
                settled[name], changes = part.settled(states[name], untouched)
                self._log_changes({f"{name}.{key}": change for key, change in changes.items()}, source)
        return settled

    def _log_values(self, states: Mapping[str, Any], own: Mapping[str, Any], source: str) -> None:
        """Log each plain value that was never changed and is given otherwise now: it may be meant as a setting."""
        for name in own.get("unchanged", ()):
            if name in self._given and name in states and self._given[name] != states[name] and self._ranks.rank == 0:
                _log.warning(
                    "loop[%r] is %r, as in %s, and not %r, as given here: a plain value is put back; "
                    "settings go into config=",
                    *(name, states[name], source, self._given[name]),
                )

    def _compare_config(self, saved: Any, source: str) -> None:
        if saved is not None and self.config is None:
            _log.warning("%s has settings, and this Loop was given no config= to compare them with", source)
        elif saved is not None and self.config is not None:
            changes = config_differences(self.config, saved)
            self._log_changes({f"{CONFIG}.{key}": change for key, change in changes.items()}, source)

    def _log_changes(self, changes: Mapping[str, str], source: str) -> None:
        for name, change in changes.items() if self._ranks.rank == 0 else ():
            _log.warning("%s differs from %s: %s; the setting given here holds", name, source, change)

    def put_foreign(self, content: Any, names: StateMap, source: str, *, strict: bool) -> Differences:
        """Take over what another program has saved, and return how it differs.

        Raises:
            MismatchError: As for `put`, or if the file has not what the map names.
        """
        found = picked(content, names, source)
        as_they_are = {name: part.take() for name, part in self._loaders.items() if not isinstance(part, CarriedPart)}
        own = {"random": take_random_state(), "feed": {}, "loaders": as_they_are}
        counts = {"schema": SCHEMA, **found.counts, "batch": 0, "exact": True, "ranks": [own] * self._ranks.size}
        advice = f"In map= give each of {', '.join(self._parts)} the key of its state"
        differences = self.put({**found.states, KEY: counts}, source, strict=strict, advice=advice)
        if found.unused:
            _log.info("%s also holds %s, which map= does not name", source, ", ".join(found.unused))
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

    def _put_own(self, ranks: list[Mapping[str, Any]], states: Mapping[str, Any], *, strict: bool) -> None:
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
            if name in states:
                part.put(states[name])
        random = own["random"] if rank < saved else None
        is_other = saved != here
        origin = Resumed(source=self.source, is_strict=strict, is_of_other_ranks=is_other, random=random)
        self._feed.put(own["feed"], origin)
