"""The options of a `CheckpointManager` that other classes and functions pass on to it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, Final

from checkpointer.errors import PolicyError
from checkpointer.manager import CheckpointManager

MANAGER_OPTIONS: Final = tuple(
    name
    for name, parameter in inspect.signature(CheckpointManager).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
)
"""Names of the arguments of `CheckpointManager` besides the directory and the policy."""


def check_options(options: Mapping[str, Any], owner: str, *, own: Iterable[str] = ()) -> None:
    """Raise unless ``owner`` can pass every option on to `CheckpointManager`.

    Args:
        options: The options by name.
        owner: The name of the class that got them. The message has it.
        own: Arguments of `CheckpointManager` that the owner sets itself.

    Raises:
        PolicyError: For an unknown option, with the closest known name, and for one that the owner sets itself.

    Example:
        >>> check_options({"miror": "s3://bucket/run"}, "Loop")
        Traceback (most recent call last):
        ...
        checkpointer.errors.PolicyError: Loop has no option 'miror'; did you mean 'mirror'?
    """
    own = tuple(own)
    for name in options:
        if name in own:
            msg = f"{name!r} cannot be an option: {owner} sets it itself; leave it out"
            raise PolicyError(msg)
        if name not in MANAGER_OPTIONS:
            known = [option for option in MANAGER_OPTIONS if option not in own]
            close = difflib.get_close_matches(str(name), known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"the options are {', '.join(known)}"
            msg = f"{owner} has no option {name!r}; {hint}"
            raise PolicyError(msg)
