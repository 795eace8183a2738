"""The state of a whole training: its objects, its random numbers, and its position."""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from checkpointer import Record
from checkpointer._display import some_of
from checkpointer.errors import MismatchError, ObservationError, PolicyError, warn
from checkpointer.ports import Listener, Ranks
from checkpointer_torch.loader_view import LoaderView
from checkpointer_torch.measured_weights import MeasuredWeights
from checkpointer_torch.object_parts import Part, StatefulPart
from checkpointer_torch.prepared import accumulation_of, unwrapped
from checkpointer_torch.random_state import put_random_state, take_random_state
from checkpointer_torch.resume_from_foreign import StateMap, picked
from checkpointer_torch.settings import CONFIG, config_differences, plain_config
from checkpointer_torch.sharded_state import KEY, ShardedState, joined
from checkpointer_torch.skip_batches import ResumedFrom
from checkpointer_torch.state_differences import Differences, are_alike
from checkpointer_torch.tensor_layouts import whole_of
from checkpointer_torch.training_objects import TrainingObjects
from checkpointer_torch.training_position import TrainingPosition
from checkpointer_torch.value_parts import FunctionPart

SCHEMA: Final = 1
_log: Final = logging.getLogger("checkpointer.torch")


class TrainingState(Listener):
    """Takes and puts back all that an exact resume needs.

    Each process has its own random numbers, place in the data, and values of functions.
    """

    def __init__(self, objects: Mapping[str, Any], ranks: Ranks, config: Any = None) -> None:
        if KEY in objects:
            msg = f"an object is called {KEY!r}, where the loop keeps its own state; give it another name"
            raise PolicyError(msg)
        self.config = None if config is None else plain_config(config)
        self.objects = TrainingObjects(objects)
        self.summary = ", ".join([*self.objects.summaries, *[CONFIG] * (config is not None), "random states"])
        """A summary of the saved objects. The loop logs it."""
        self.measured = MeasuredWeights(map(unwrapped, objects.values()))
        self.accumulates = accumulation_of(objects)
        """Says whether accelerate's optimizers accumulate gradients; None without any of them."""
        self.position = TrainingPosition()
        self.took_s: float | None = None
        """Seconds that the last save took, from taking the state until it was durable; None before the first save."""
        self._taken_at = 0.0
        self._samplers = [thing for thing in objects.values() if hasattr(thing, "set_epoch")]
        self.sharded: ShardedState | None = None
        """What splits the state, if each process writes its shards."""
        self._ranks = ranks
        self._knows_unmade = False

    def on_saved(self, record: Any) -> None:
        """See `Listener.on_saved`."""
        self.took_s = time.monotonic() - self._taken_at

    def begin(self) -> None:
        """Log what will be saved, and remember which objects the program refers to."""
        self.objects.begin()
        if self._ranks.rank == 0:
            _log.info("saved by this loop: %s", self.summary)

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Return the batches that this epoch has left."""
        for sampler in self._samplers:
            sampler.set_epoch(self.position.epoch)
        view = LoaderView(loader)
        within = view.samplers if view.is_indexed else []
        for name, part in self.objects.shared.items():
            if isinstance(part, StatefulPart) and any(part.stateful is sampler for sampler in within):
                msg = (
                    f"{name} is the sampler of the loader that batches() was given, and has a state of its own, so "
                    "that a resume would go on from its place twice; give the Loop the loader alone, or use "
                    "torchdata.StatefulDataLoader"
                )
                raise ObservationError(msg)
        return self.position.data.begin(view, self.position.epoch)

    @property
    def left_over(self) -> int:
        """Batches of the epoch that has just ended whose gradients are in no step."""
        count = self.position.left_over
        parameters = (one for module in self.objects.modules.values() for one in module.parameters())
        return count if count and any(one.grad is not None for one in parameters) else 0

    # Taking

    def take(self) -> dict[str, Any]:
        """Return the whole state; all processes call this together."""
        own = self._ranks.gather(self.take_own())
        state: dict[str, Any] = self._whole(self.take_shared())
        state[KEY]["ranks"] = own
        return state

    def take_own(self) -> dict[str, Any]:
        """Return what this process alone has."""
        return {
            "random": take_random_state(),
            "feed": self.position.data.take(),
            "loaders": {name: part.take() for name, part in self.objects.own.items()},
        }

    def take_shared(self) -> dict[str, Any]:
        """Return what all processes have alike, or have shards of."""
        self._taken_at = time.monotonic()
        objects, position = self.objects, self.position
        state: dict[str, Any] = {} if self.config is None else {CONFIG: copy.deepcopy(self.config)}
        state |= {name: part.take() for name, part in objects.shared.items()}
        if self._ranks.rank == 0:
            objects.outside.check(state)
            self._warn_of_unmade(state)
        self.measured.note(position.step)
        state[KEY] = {
            "schema": SCHEMA,
            **objects.unchanged(),
            "parameters": objects.parameters,
            "epoch": position.epoch,
            "step": position.step,
            "batch": position.data.used,
            "exact": not position.is_within_step,
            "left_over": self.left_over,
            "unfed": position.unfed_since is not None and position.step > position.unfed_since,
        }
        return state

    def _warn_of_unmade(self, state: Mapping[str, Any]) -> None:
        if self._knows_unmade:
            return
        self._knows_unmade = True
        if unmade := self.objects.unmade(state):
            msg = (
                f"{some_of(unmade, 5)}: on the meta device, so the checkpoints have no values of these tensors, and a "
                "resume of a model with memory refuses them; materialise the model before the first save"
            )
            warn(msg)

    def weights(self) -> dict[str, Any]:
        """Return the modules' states alone; each of several modules under its name."""
        self._taken_at = time.monotonic()
        self.measured.note(self.position.step)
        states = {name: self.objects.shared[name].take() for name in self.objects.modules}
        if len(states) == 1:
            return self._whole(dict(next(iter(states.values()))))
        return self._whole({f"{name}.{key}": value for name, state in states.items() for key, value in state.items()})

    def _whole(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a state without the DTensors that this process has all of: any program can read it."""
        is_spread = self.sharded is not None or not self.objects.meshes
        whole: dict[str, Any] = state if is_spread else whole_of(state)
        return whole

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """Let a manager read a checkpoint of shards into the layout that this training has."""
        return contextlib.nullcontext() if self.sharded is None else self.sharded.reading()

    # Putting back

    def put(
        self, state: Any, source: str, *, strict: bool, advice: str = "Give the loop the objects it was saved with"
    ) -> Differences:
        """Take a state over and return how it differs; if ``strict`` a difference is an error that changes nothing."""
        state = joined(state)
        own = _own_state(state, source)
        ranks = own["ranks"]
        states = {**ranks[self._ranks.rank % len(ranks)]["loaders"], **state}
        states = {name: value for name, value in states.items() if name not in (KEY, CONFIG)}
        self._check_movable(ranks, source, strict=strict)
        states, misplaced = self.objects.in_order(states, own.get("parameters", {}))
        differences = self.objects.compare(states)
        for name, difference in misplaced.items():
            differences = differences.plus(name, difference)
        if differences and strict:
            msg = (
                f"{source} does not fit this training, and nothing was loaded: {differences}. {advice}, or pass "
                "strict=False to take what fits"
            )
            raise MismatchError(msg)
        fitting = {name: value for name, value in states.items() if name not in misplaced}
        settled, changes, notes = self.objects.settle(fitting, own, source)
        self.objects.put(settled)
        if CONFIG in state and self.config is None:
            notes.append(f"{source} has settings, and this Loop was given no config= to compare them with")
        elif CONFIG in state and self.config is not None:
            changes |= config_differences(self.config, state[CONFIG])
        notes += [f"{name} differs from {source}: {how}; the setting given here holds" for name, how in changes.items()]
        for note in notes if self._ranks.rank == 0 else ():
            _log.warning("%s", note)
        self.position.go_on(source, epoch=own["epoch"], step=own["step"])
        self._put_own(own, states, strict=strict)
        self.measured.note(self.position.step)
        for warning in _doubts(own, source):
            warn(warning)
        return differences

    def put_foreign(
        self, content: Any, names: StateMap, source: str, *, strict: bool, record: Record | None
    ) -> Differences:
        """Take over a state that another program has saved, and return how it differs.

        If the map has no step or epoch, that of the ``record`` counts.
        """
        at = {} if record is None else {"step": record.step, "epoch": record.progress.epochs}
        states, counts, unused = picked(content, names, source, at)
        objects = self.objects
        as_they_are = {name: part.take() for name, part in objects.own.items() if not isinstance(part, FunctionPart)}
        own = {"random": take_random_state(), "feed": {}, "loaders": as_they_are}
        loop = {"schema": SCHEMA, **counts, "batch": 0, "exact": True, "ranks": [own] * self._ranks.size}
        advice = f"In map= give each of {', '.join(objects.shared)} the key of its state"
        differences = self.put({**states, KEY: loop}, source, strict=strict, advice=advice)
        if unused:
            _log.info("%s also holds %s, which map= does not name", source, ", ".join(unused))
        return differences

    def _check_movable(self, ranks: Sequence[Mapping[str, Any]], source: str, *, strict: bool) -> None:
        """Raise, or warn, if processes had values of their own, and another number of processes is here."""
        saved, here = len(ranks), self._ranks.size
        if saved == here:
            return
        own = [name for name, part in self.objects.own.items() if not _moves_by_itself(part)]
        stuck = [name for name in own if not are_alike(one["loaders"].get(name) for one in ranks)]
        if not stuck:
            return
        what = f"{source}: {', '.join(stuck)} differed between the {saved} processes, so {here} cannot share it out"
        if strict:
            msg = f"{what}, and nothing was loaded; resume(strict=False) takes what the first processes had"
            raise MismatchError(msg)
        warn(f"{what}; taken is what the first processes had")

    def _put_own(self, loop: Mapping[str, Any], states: Mapping[str, Any], *, strict: bool) -> None:
        ranks, used, data = loop["ranks"], loop["batch"], self.position.data
        saved, here, rank = len(ranks), self._ranks.size, self._ranks.rank
        own, data.used = ranks[rank % saved], used
        is_alike = saved != here and are_alike(one["feed"] for one in ranks)
        if saved != here:
            data.used = used if is_alike else used * saved // here
            msg = (
                f"saved by {saved} processes, resumed by {here}: each goes on after {data.used} of its batches, "
                "and the random numbers are others; not exact"
            )
            warn(msg)
        random = own["random"] if rank < saved else None
        if random is not None:
            put_random_state(random)
        for name, part in self.objects.own.items():
            if name in states and (saved == here or not _moves_by_itself(part)):
                part.put(states[name])
        origin = ResumedFrom(
            source=self.position.source,
            is_strict=strict,
            ranks=(saved, here),
            used=used,
            is_alike=is_alike,
            random=random,
        )
        data.put(own["feed"], origin)


def _moves_by_itself(part: Part) -> bool:
    """Return whether the place in a loader follows from the samples that all processes have used."""
    return isinstance(part, LoaderView) and part.distributed_sampler is not None


def _own_state(state: Any, source: str) -> Mapping[str, Any]:
    """Return the loop's own state, after checking that this version of the library can read it."""
    if not isinstance(state, Mapping) or not isinstance(state.get(KEY), Mapping):
        msg = (
            f"{source} was not saved by a Loop, so it has no count of finished steps. To go on from another "
            "program's file pass map={'model': 'its key', 'optimizer': 'its key', 'epoch': 'its key'}; to start "
            "from its weights alone call load_weights(model, source)"
        )
        raise MismatchError(msg)
    own: Mapping[str, Any] = state[KEY]
    if own.get("schema") != SCHEMA:
        msg = f"{source} is of a newer version (schema {own.get('schema')!r}, known: {SCHEMA}); update this library"
        raise MismatchError(msg)
    return own


def _doubts(own: Mapping[str, Any], source: str) -> Iterator[str]:
    """Yield the reasons why a resume from this state is not exact."""
    if own.get("left_over"):
        yield (
            f"{source} was saved at the end of an epoch, and the gradients of its last {own['left_over']} batches "
            "are not in it: the next step is without them"
        )
    if own.get("unfed"):
        yield (
            f"{source} was saved within epoch {own['epoch']}, and the batches of its steps did not come from "
            "loop.batches(): the epoch begins again. To go on within it, take them from loop.batches(loader)"
        )
    if not own["exact"]:
        yield (
            f"{source} was saved when an exception came within step {own['step'] + 1}: the changes of that step "
            "are in it, and the step is taken again. Resume from a step before to be exact"
        )
