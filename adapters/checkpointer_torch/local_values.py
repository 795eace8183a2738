"""Values that a program binds anew: a function returns them at each save, and the loop returns the restored ones."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

from checkpointer import CheckpointerWarning
from checkpointer.errors import PolicyError
from checkpointer_torch.state_differences import Differences

__all__ = ["FunctionPart"]

_ARRAY: Final = "numpy array"
"""Marks a numpy array that is saved as a tensor, because a safe load refuses arrays."""


class FunctionPart:
    """A value that the program binds anew, so that a resume cannot fill an object in place.

    `read` returns the restored value until the next save, and otherwise calls the function.
    """

    def __init__(self, name: str, function: Callable[[], Any]) -> None:
        try:
            inspect.signature(function).bind()
        except TypeError as error:
            msg = f"{name} is a function that needs arguments ({error}); pass one without, such as lambda: value"
            raise PolicyError(msg) from error
        except ValueError:  # A builtin may have no signature.
            pass
        self._name = name
        self._function = function
        self._restored: list[Any] = []
        """The value that a resume has put back, until the next save."""
        self._is_read = True

    def read(self) -> Any:
        """Return the value that was put back, or the function's value now."""
        self._is_read = True
        return self._restored[0] if self._restored else self._function()

    def take(self) -> Any:
        """See `Part.take`."""
        if not self._is_read:
            msg = (
                f"{self._name!r} was put back by resume(), and the program has not read it: it went on with another "
                f"value, which is not exact. Read loop[{self._name!r}] after resume()"
            )
            warnings.warn(msg, CheckpointerWarning, stacklevel=2)
        self._restored, self._is_read = [], True
        return _encoded(self._function())

    def compare(self, state: Any) -> Differences:
        """See `Part.compare`."""
        return Differences()

    def put(self, state: Any) -> None:
        """See `Part.put`."""
        self._restored, self._is_read = [_decoded(state)], False


def _encoded(value: Any) -> Any:
    """Return the value as a safe load takes it: arrays as tensors, tensors without their graph."""
    if isinstance(value, torch.Tensor):
        return value.detach() if value.grad_fn is not None else value
    numpy = sys.modules.get("numpy")  # A program without numpy does not import it here.
    if numpy and isinstance(value, (numpy.ndarray, numpy.generic)) and value.dtype.kind in "biufc":
        return {_ARRAY: torch.from_numpy(value.copy())} if value.ndim else value.item()
    return _mapped(value, _encoded)


def _decoded(value: Any) -> Any:
    if isinstance(value, Mapping) and set(value) == {_ARRAY}:
        return value[_ARRAY].numpy()
    return _mapped(value, _decoded)


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    if type(value) is dict:
        return {key: function(item) for key, item in value.items()}
    return type(value)(map(function, value)) if type(value) in (list, tuple) else value
