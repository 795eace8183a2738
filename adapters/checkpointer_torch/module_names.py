"""The plain names of a module's state, whatever wrappers DDP and ``torch.compile`` have put around it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import nn

__all__ = ["plain_state", "wrapped_state"]

_WRAPPERS: Final = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
"""Names that only wrappers give to the module within them."""


def _namer(module: nn.Module) -> Callable[[str], str]:
    """Return a function that takes the names of wrappers out of a key, or out of a path of modules."""
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    modules = module.named_modules(remove_duplicate=False)
    wrapped = {f"{path}.module".lstrip(".") for path, inner in modules if isinstance(inner, parallel)}

    def plain(key: str) -> str:
        parts = key.split(".")
        paths = (".".join(parts[: number + 1]) for number in range(len(parts)))
        return ".".join(
            part for part, path in zip(parts, paths, strict=True) if part not in _WRAPPERS and path not in wrapped
        )

    return plain


def plain_state(module: nn.Module) -> OrderedDict[str, Any]:
    """Return the module's ``state_dict`` under the names it has without wrappers."""
    name = _namer(module)
    state = module.state_dict()
    plain = OrderedDict((name(key), value) for key, value in state.items())
    versions = getattr(state, "_metadata", {})
    plain._metadata = {name(path): value for path, value in versions.items()}  # type: ignore[attr-defined]
    return plain


def wrapped_state(module: nn.Module, plain: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """Return a plain state under the names that ``module.load_state_dict`` wants; leave out other names."""
    name = _namer(module)
    state = module.state_dict()
    wrapped = OrderedDict((key, plain[name(key)]) for key in state if name(key) in plain)
    versions = getattr(plain, "_metadata", {})
    paths = getattr(state, "_metadata", {})
    wrapped._metadata = {path: versions[name(path)] for path in paths if name(path) in versions}  # type: ignore[attr-defined]
    return wrapped
