"""Loaders of other packages: the torch loader within them, and what a loader has."""

from __future__ import annotations

from typing import Any, Final

from torch.utils.data import DataLoader

_WRAPPED: Final = {
    "lightning": "_dataloader",
    "lightning_fabric": "_dataloader",
    "accelerate": "base_dataloader",
    "ray": "_dataloader",
    "tqdm": "iterable",
}
"""Attributes in which the loaders of other packages keep the loader that they wrap, batch for batch."""
TORCH: Final = ("torch.", "torchdata.")
"""Beginnings of the modules of torch's own loaders and samplers."""


class FunctionLoader:
    """The batches that a function returns. The random states are their place, or the function's ``state_dict``."""

    def __init__(self, function: Any) -> None:
        self._function = function
        has_state = is_stateful(function)  # Without one there is nothing to restore.
        self.state_dict: Any = function.state_dict if has_state else dict
        self.load_state_dict: Any = function.load_state_dict if has_state else bool

    def __iter__(self) -> FunctionLoader:
        return self

    def __next__(self) -> Any:
        return self._function()


def torch_loader(loader: Any) -> DataLoader[Any] | None:
    """Return the ``DataLoader`` that loads the data, also when Fabric, accelerate or tqdm wraps it."""
    own = getattr(loader, "__dict__", {})
    for kind in type(loader).__mro__:
        name = _WRAPPED.get(kind.__module__.partition(".")[0])
        if name in own:
            return torch_loader(own[name])
    return loader if isinstance(loader, DataLoader) else None


def is_stateful(thing: Any) -> bool:
    """Return whether an object has ``state_dict`` and ``load_state_dict``."""
    return hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")


def length_of(thing: Any) -> int | None:
    """Return the length of a loader or dataset; None if it is not known."""
    try:
        return len(thing)
    except Exception:  # Objects without a length raise errors of many kinds.
        return None
