"""The plain names of a module's state, whatever DDP and ``torch.compile`` have wrapped around it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final

from torch import nn

__all__ = ["plain_state", "wrapped_state"]

_WRAPPERS: Final = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
"""Names that only wrappers give what they wrap."""


class _Names:
    """Leaves out what wrappers add to a key or to a path of modules."""

    def __init__(self, module: nn.Module) -> None:
        parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
        self._wrapped = {
            f"{path}.module".lstrip(".")
            for path, inner in module.named_modules(remove_duplicate=False)
            if isinstance(inner, parallel)
        }

    def plain(self, key: str) -> str:
        path, kept = "", []
        for part in key.split("."):
            path = f"{path}.{part}" if path else part
            if part not in _WRAPPERS and path not in self._wrapped:
                kept.append(part)
        return ".".join(kept)


def plain_state(module: nn.Module) -> OrderedDict[str, Any]:
    """Return the module's ``state_dict`` under the names it has without wrappers.

    Example:
        >>> import torch
        >>> list(plain_state(torch.nn.DataParallel(torch.nn.Linear(2, 1))))
        ['weight', 'bias']
    """
    names = _Names(module)
    state = module.state_dict()
    plain = OrderedDict((names.plain(key), value) for key, value in state.items())
    metadata = getattr(state, "_metadata", {})
    plain._metadata = {names.plain(path): value for path, value in metadata.items()}  # type: ignore[attr-defined]
    return plain


def wrapped_state(module: nn.Module, plain: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """Return a plain state under the names that ``module.load_state_dict`` wants; what it has not is left out."""
    names = _Names(module)
    state = module.state_dict()
    wrapped = OrderedDict((key, plain[names.plain(key)]) for key in state if names.plain(key) in plain)
    versions = getattr(plain, "_metadata", {})
    paths = {path: names.plain(path) for path in getattr(state, "_metadata", {})}
    wrapped._metadata = {  # type: ignore[attr-defined]
        path: versions[name] for path, name in paths.items() if name in versions
    }
    return wrapped
