"""An object that a loop saves for the program: if the program stops using it, the saved state is out of date."""

from __future__ import annotations

import sys
import warnings
from typing import Any, Final

from checkpointer import CheckpointerWarning

__all__ = ["Held"]

_OWN_REFERENCES: Final = 2
"""How many references there are while `Held` counts them, if the program has none."""


class Held:
    """An object under its name. If the program binds the name to another object, the loop has the last reference."""

    __slots__ = ("_name", "_was_shared", "thing")

    def __init__(self, name: str, thing: Any) -> None:
        self._name = name
        self._was_shared = False
        self.thing = thing

    def begin(self) -> None:
        """Remember whether the program has a reference when the training begins."""
        self._was_shared = sys.getrefcount(self.thing) > _OWN_REFERENCES

    def check(self) -> None:
        """Warn if the program had a reference, and has none any more."""
        if self._was_shared and sys.getrefcount(self.thing) <= _OWN_REFERENCES:
            name = self._name
            msg = (
                f"{name!r} is saved as the object that was given to the Loop, and the program has no reference to that "
                f"object any more: if it has bound the name to another one, that one is not saved. Pass "
                f"{name}=lambda: {name}, and read loop[{name!r}] after resume()"
            )
            warnings.warn(msg, CheckpointerWarning, stacklevel=2)
