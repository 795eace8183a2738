"""Facts about a loader: the torch loader within it, its samplers and generators, and what a place in it depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import attrs
from torch.utils.data import DataLoader, IterableDataset

from checkpointer_torch.random_state import accessors

__all__ = [
    "FunctionLoader",
    "facts_of",
    "forget",
    "is_indexed",
    "is_of_torchdata",
    "is_stateful",
    "keep_epoch",
    "put_generators",
    "put_loader",
    "samplers",
    "set_epoch",
    "stateful_loader",
    "take_generators",
    "take_loader",
    "torch_loader",
]

_WRAPPED: Final = {
    "lightning": "_dataloader",
    "lightning_fabric": "_dataloader",
    "accelerate": "base_dataloader",
    "tqdm": "iterable",
}
"""Attributes in which the loaders of other packages keep the loader that they wrap, batch for batch."""
_WITHIN: Final = ("sampler", "batch_sampler", "root", "source")
"""Attributes in which samplers, and the nodes of ``torchdata.nodes``, keep one another."""


@attrs.frozen
class FunctionLoader:
    """The batches that a function returns. The random states are their place, or the function's ``state_dict``."""

    function: Callable[[], Any]

    def __iter__(self) -> FunctionLoader:
        return self

    def __next__(self) -> Any:
        return self.function()

    def state_dict(self) -> Any:
        """Return the function's own state; without one there is nothing to restore."""
        return self.function.state_dict() if is_stateful(self.function) else {}  # type: ignore[attr-defined]

    def load_state_dict(self, state: Any) -> None:
        """Restore the function's own state."""
        if is_stateful(self.function):
            self.function.load_state_dict(state)  # type: ignore[attr-defined]


def torch_loader(loader: Any) -> DataLoader[Any] | None:
    """Return the ``DataLoader`` that loads the data, also when Fabric, accelerate or tqdm wraps it."""
    own = getattr(loader, "__dict__", {})
    for kind in type(loader).__mro__:
        name = _WRAPPED.get(kind.__module__.partition(".")[0])
        if name in own:
            return torch_loader(own[name])
    return loader if isinstance(loader, DataLoader) else None


def _inner(loader: Any) -> Any:
    inner = torch_loader(loader)
    return loader if inner is None else inner


def is_stateful(thing: Any) -> bool:
    """Return whether an object has ``state_dict`` and ``load_state_dict``."""
    return hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")


def stateful_loader(loader: Any) -> Any:
    """Return the object whose ``state_dict`` has the place of the loader, or None."""
    inner = torch_loader(loader)
    if inner is not None and not is_stateful(inner):
        return None  # The wrapper of accelerate has the methods, and they fail.
    return loader if is_stateful(loader) else inner


def is_of_torchdata(loader: Any) -> bool:
    """Return whether the ``state_dict`` of a loader is the one of ``torchdata.StatefulDataLoader``."""
    return is_stateful(loader) and str(getattr(type(loader).state_dict, "__module__", "")).startswith(
        "torchdata.stateful_dataloader."
    )


def is_indexed(loader: Any) -> bool:
    """Return whether the batches that were used can be skipped by their indices.

    A ``StatefulDataLoader`` needs its own state only if its dataset or sampler has a state.
    """
    inner = torch_loader(loader)
    if inner is None or isinstance(inner.dataset, IterableDataset):
        return False
    return not is_stateful(inner) or (
        is_of_torchdata(inner) and not any(map(is_stateful, (inner.dataset, *samplers(inner))))
    )


def samplers(loader: Any) -> list[Any]:
    """Return the samplers of a loader and the samplers within those; for ``torchdata.nodes`` also the nodes.

    For any other iterable they are those of the loaders that it holds.
    """
    found: dict[int, Any] = {}
    if torch_loader(loader) is None:
        found = {id(one): one for one in getattr(loader, "__dict__", {}).values() if torch_loader(one) is not None}
    to_visit = [_inner(loader), *found.values()]
    for holder in to_visit:  # It grows meanwhile.
        for name in _WITHIN:
            one = getattr(holder, name, None)
            if one is not None and id(one) not in found:
                found[id(one)] = one
                to_visit.append(one)
    return list(found.values())


def set_epoch(loader: Any, epoch: int) -> None:
    """Set the epoch of a loader, its samplers and its dataset."""
    if "_num_iter_calls" in getattr(loader, "__dict__", {}):
        loader._num_iter_calls = epoch  # Fabric counts passes, and sets that as the epoch of the samplers.
    holders = [loader, _inner(loader), *samplers(loader)]
    holders += [getattr(holder, "dataset", None) for holder in holders]
    for holder in {id(holder): holder for holder in holders}.values():
        if hasattr(holder, "set_epoch"):
            holder.set_epoch(epoch)


def keep_epoch(loader: Any, epoch: int) -> None:
    """Set the epoch of samplers again where the loader's ``__iter__`` set another, from a count of its own."""
    for sampler in samplers(loader):
        if hasattr(sampler, "set_epoch") and getattr(sampler, "epoch", epoch) != epoch:
            sampler.set_epoch(epoch)


# Their state


def take_generators(loader: Any) -> list[Any]:
    """Return the states of the random generators that a loader and its samplers hold."""
    return [read() for read, _ in _generators(loader)]


def put_generators(loader: Any, states: Iterable[Any]) -> None:
    """Put the generators into the states that `take_generators` returned."""
    for (_, write), state in zip(_generators(loader), states, strict=False):
        write(state)


def _generators(loader: Any) -> list[tuple[Callable[[], Any], Callable[[Any], object]]]:
    holders = (_inner(loader), *samplers(loader))
    held = {id(value): value for holder in holders for value in list(getattr(holder, "__dict__", {}).values())}
    return [access for access in map(accessors, held.values()) if access is not None]


def take_loader(loader: Any) -> Any:
    """Return the state of a loader: its own, or the states of its random generators."""
    stateful = stateful_loader(loader)
    if stateful is None:
        return take_generators(loader)
    inner: Any = torch_loader(loader)
    if is_of_torchdata(inner) and (inner._iterator is None or inner._iterator._finished):
        # state_dict() or load_state_dict() would begin a pass, which draws from the random numbers of the training.
        if inner.next_iter_state is None and is_indexed(loader):
            return take_generators(loader)
        if inner._iterator is None:
            return inner.next_iter_state or {}
    return stateful.state_dict()


def put_loader(loader: Any, state: Any) -> None:
    """Put a loader into the state that `take_loader` returned."""
    stateful = stateful_loader(loader)
    if stateful is None or isinstance(state, list):
        forget(torch_loader(loader))
        put_generators(loader, state)
    else:
        stateful.load_state_dict(state)


def forget(loader: Any) -> None:
    """Let a ``DataLoader`` begin its next pass at the beginning."""
    if getattr(loader, "persistent_workers", False) or is_of_torchdata(loader):
        loader._iterator = None
    if is_of_torchdata(loader):
        loader.next_iter_state = None
        loader._initial_iter_for_state_dict = False


# What a place depends on


def facts_of(loader: Any) -> dict[str, Any]:
    """Return what must be the same for a place in this loader to be the same; None where it is not known."""
    inner = torch_loader(loader)
    if inner is None:
        return {"loader": _kind(loader), "batches": _length(loader)}
    is_iterable = isinstance(inner.dataset, IterableDataset)
    within = samplers(inner)
    facts = {
        "loader": _kind(inner),
        "dataset length": _length(inner.dataset),
        "batches": None if is_iterable else _length(inner),  # An iterable dataset warns if its length is asked for.
        "batch size": _first([inner, *within], "batch_size"),
        "drop_last": _first([inner, *within], "drop_last"),
        "sampler": " of ".join(type(sampler).__name__ for sampler in reversed(within)),
        "sampler seed": _first(within, "seed", "initial_seed"),
    }
    if is_iterable or not is_indexed(loader):
        facts["num_workers"] = inner.num_workers
    elif is_of_torchdata(inner):
        facts["workers"] = inner.num_workers > 0  # With workers it shuffles twice for each pass.
    return facts


def _kind(loader: Any) -> str:
    """Return the class that decides on the order: a user's subclass may have any name."""
    for kind in type(loader).__mro__:
        if kind.__module__.startswith(("torch.", "torchdata.")):
            return kind.__name__
    return "function" if isinstance(loader, FunctionLoader) else "iterable"


def _length(thing: Any) -> int | None:
    try:
        return len(thing)
    except Exception:  # Objects without a length raise errors of many kinds.
        return None


def _first(holders: Iterable[Any], *names: str) -> Any:
    values = [getattr(holder, name, None) for holder in holders for name in names]
    return next((value for value in values if isinstance(value, (bool, int))), None)
