"""What must be the same for a place in a loader to be the same."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.utils.data import IterableDataset

from checkpointer_torch.foreign_loaders import TORCH, FunctionLoader, length_of
from checkpointer_torch.loader_view import LoaderView


def facts_of(view: LoaderView) -> dict[str, Any]:
    """Return what must be the same for a place in this loader to be the same; None where it is not known."""
    inner = view.inner
    if inner is None:
        return {"loader": _order_of(view), "batches": length_of(view.loader)}
    is_iterable = isinstance(inner.dataset, IterableDataset)
    within = view.samplers
    facts = {
        "loader": _order_of(view),
        "dataset length": length_of(inner.dataset),
        "batches": None if is_iterable else length_of(inner),  # An iterable dataset warns if its length is asked for.
        "batch size": _first([inner, *within], "batch_size"),
        "drop_last": _first([inner, *within], "drop_last"),
        "sampler": " of ".join(type(sampler).__name__ for sampler in reversed(within)),
        "sampler seed": _first(within, "seed", "initial_seed"),
        "replicas": _first(within, "num_replicas"),
    }
    if is_iterable or not view.is_indexed:
        facts["num_workers"] = inner.num_workers
    elif view.is_torchdata:
        facts["workers"] = inner.num_workers > 0  # With workers it shuffles twice for each pass.
    return facts


def _order_of(view: LoaderView) -> str:
    """Return the name of the class that decides on the order: a user's subclass may have any name."""
    for kind in type(view.loader if view.inner is None else view.inner).__mro__:
        if kind.__module__.startswith(TORCH):
            return kind.__name__
    return "function" if isinstance(view.loader, FunctionLoader) else "iterable"


def _first(holders: Iterable[Any], *names: str) -> Any:
    values = [getattr(holder, name, None) for holder in holders for name in names]
    return next((value for value in values if isinstance(value, (bool, int))), None)
