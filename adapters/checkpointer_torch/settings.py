"""The settings of a training: saved with it, compared at a resume, and never put back."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import enum
import os
import types
from collections.abc import Mapping, Sequence, Set
from pathlib import PurePath
from typing import Any, Final

import attrs
import torch

from checkpointer import CheckpointManager
from checkpointer.errors import NotFoundError, PolicyError
from checkpointer.manager_options import check_options
from checkpointer.ports import Storage

CONFIG: Final = "config"
"""The settings lie under this key of a checkpoint, beside the objects."""
_NOTHING: Final[Mapping[str, Any]] = {}
_PLAIN: Final[tuple[Any, ...]] = (bool, int, float, complex, str, bytes)


def read_config(
    directory: str | os.PathLike[str] | Storage,
    which: str | int | None = None,
    *,
    options: Mapping[str, Any] = _NOTHING,
) -> dict[str, Any] | None:
    """Read the settings that a `Loop` was given as ``config=``, before the model is built.

    Nothing is built, and nothing but plain data is unpickled. On a local disk the tensors are not read.

    Args:
        directory: As for `Loop`.
        which: None or ``"last"`` for the newest valid checkpoint, a name, or a step.
        options: As for `Loop`, such as ``{"trust": key}``.

    Returns:
        The settings as plain data; None if the directory has no checkpoint.

    Raises:
        NotFoundError: If the checkpoint was saved without ``config=``.
        RestoreError: As for `CheckpointManager.restore`.

    Example:
        >>> import tempfile, torch
        >>> from checkpointer import EverySteps, KeepLast, Policy
        >>> from checkpointer_torch import Loop
        >>> folder, policy = tempfile.mkdtemp(), Policy(EverySteps(1), [KeepLast(1)])
        >>> read_config(folder)
        >>> with Loop(folder, policy, config={"width": 3}, model=torch.nn.Linear(3, 1)) as loop:
        ...     for _ in loop.steps(1):
        ...         decision = loop.step()
        >>> read_config(folder)
        {'width': 3}
    """
    check_options(options, "read_config", own=("state", "weights", "save"))
    verify = "full" if options.get("trust") is not None else "size"
    with contextlib.closing(CheckpointManager(directory, **options)) as manager:
        restored = manager.restore(which, verify=verify, mmap=True)  # type: ignore[arg-type]
        if restored is None:
            return None
        if not isinstance(restored.state, Mapping) or CONFIG not in restored.state:
            msg = f"{restored.record.name} was saved without settings; pass config= to the Loop that saves it"
            raise NotFoundError(msg)
        return dict(restored.state[CONFIG])


def plain_config(config: Any) -> dict[str, Any]:
    """Return settings as plain data. Raises `PolicyError` if a value is not a setting; the message names it."""
    plain = _plain(config, CONFIG)
    if not isinstance(plain, dict):
        msg = f"config is {config!r:.200}; expected named settings: a dict, an argparse.Namespace or a dataclass"
        raise PolicyError(msg)
    return plain


def _plain(value: Any, where: str) -> Any:
    if value is None or type(value) in _PLAIN:
        return value
    if isinstance(value, enum.Enum):
        return value.name
    for kind in _PLAIN:
        if isinstance(value, kind):  # A subclass, such as numpy's float64.
            return kind(value)
    if isinstance(value, (PurePath, torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, (Sequence, Set)):
        items = sorted(value, key=repr) if isinstance(value, Set) else value
        return [_plain(item, f"{where}[{number}]") for number, item in enumerate(items)]
    fields = _fields(value)
    if fields is not None:
        for key in fields:
            if not isinstance(key, (str, int, float, type(None))):
                msg = f"{where} has the key {key!r}; expected text or a number"
                raise PolicyError(msg)
        return {key: _plain(item, f"{where}.{key}") for key, item in fields.items()}
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return _plain(value.item(), where)
    msg = (
        f"{where} is a {type(value).__name__}, which is not a setting; expected numbers, text, paths, and lists and "
        "dicts of them. State that the training changes is given to the Loop by its own name"
    )
    raise PolicyError(msg)


def _fields(value: Any) -> Mapping[Any, Any] | None:
    if isinstance(value, Mapping):
        return value
    if isinstance(value, (argparse.Namespace, types.SimpleNamespace)):
        return vars(value)
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if attrs.has(type(value)):
        return {field.name: getattr(value, field.name) for field in attrs.fields(type(value))}
    return dict(value.model_dump()) if hasattr(value, "model_dump") else None


def config_differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, str]:
    """Return how settings differ, by name.

    Example:
        >>> config_differences({"lr": 0.01, "net": {"width": 2}}, {"lr": 0.1, "net": {"width": 2}, "seed": 1})
        {'config.lr': '0.01 here, 0.1 there', 'config.seed': 'not here, 1 there'}
    """
    ours, theirs = _flat(here), _flat(there)
    both = {name: (ours.get(name, "not"), theirs.get(name, "not")) for name in {**ours, **theirs}}
    return {name: f"{here} here, {there} there" for name, (here, there) in both.items() if here != there}


def _flat(config: Mapping[Any, Any], before: str = f"{CONFIG}.") -> dict[str, str]:
    """Return each setting's text by its dotted name; texts are equal for NaN too."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{before}{key}.")
        else:
            flat[f"{before}{key}"] = repr(value)
    return flat
