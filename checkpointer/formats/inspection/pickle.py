"""Reads what a pickle says, and runs nothing: an instruction to call something is noted, not carried out.

Python's own unpickler finds classes and calls them, so a pickle can run anything. This one cannot call or import: a
class is its name, and an object is the name and the arguments of the call that would make it.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Final

import attrs

from checkpointer.errors import CorruptError

__all__ = ["Call", "Global", "Persistent", "globals_in", "persistents_in", "read_pickle"]

MAX_OPERATIONS: Final = 60_000_000
"""A pickle of more instructions than this is refused."""
_PYTHON_2: Final = {"__builtin__": "builtins", "copy_reg": "copyreg"}
"""Modules that Python 3 has under another name."""


@attrs.frozen
class Global:
    """The name of a class or function."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@attrs.define(eq=False)
class Call:
    """A call that an unpickler would have made."""

    what: Any
    args: Any
    state: Any = None
    """The state that the object would get afterwards."""
    items: list[Any] = attrs.field(factory=list)
    """Items that would be appended, or pairs that would be set."""


@attrs.frozen(eq=False)
class Persistent:
    """A reference to something outside of the pickle; torch's are storages."""

    id: Any


_MARK: Final = object()


def read_pickle(stream: BinaryIO, limit: int = MAX_OPERATIONS) -> Any:
    """Return what the next pickle of a stream holds: plain data, `Global`, `Call` and `Persistent`.

    Example:
        >>> import io, pickle
        >>> read_pickle(io.BytesIO(pickle.dumps({"step": 400, "losses": [0.5]})))
        {'step': 400, 'losses': [0.5]}
    """
    machine = _Machine()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count > limit:
                msg = f"the pickle has more than {limit} instructions; no checkpoint's has"
                raise CorruptError(msg)
            machine.step(opcode.name, argument)
        (value,) = machine._stack
        return value
    except (CorruptError, OSError, MemoryError):
        raise
    except Exception as error:  # Damaged bytes fail anywhere: IndexError, KeyError, ValueError, TypeError...
        msg = f"it cannot be read as a pickle ({type(error).__name__}: {error})"
        raise CorruptError(msg) from error


class _Machine:
    """The stack and the memo of one pickle."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Carry out one instruction."""
        if name in _IGNORED:
            return
        if name in _PUSHES:
            self._stack.append(argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name]())
        elif name in _TUPLES:
            self._push_tuple(_TUPLES[name])
        else:
            _ACTIONS[name](self, argument)

    def _push_tuple(self, size: int) -> None:
        items = tuple(self._stack[-size:])
        assert len(items) == size
        del self._stack[-size:]
        self._stack.append(items)

    def _pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while (value := self._stack.pop()) is not _MARK:
            items.append(value)
        items.reverse()
        return items

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._stack.append(Global(_PYTHON_2.get(module, module), name))

    def _stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._stack.append(Global(str(module), str(name)))

    def _reduce(self, _: Any) -> None:
        args, what = self._stack.pop(), self._stack.pop()
        self._stack.append(Call(what, args))

    def _new_with_keywords(self, _: Any) -> None:
        keywords, args, what = self._stack.pop(), self._stack.pop(), self._stack.pop()
        self._stack.append(Call(what, (args, keywords)))

    def _object(self, _: Any) -> None:
        what, *args = self._pop_to_mark()
        self._stack.append(Call(what, tuple(args)))

    def _instance(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._stack.append(Call(Global(_PYTHON_2.get(module, module), name), tuple(self._pop_to_mark())))

    def _build(self, _: Any) -> None:
        state = self._stack.pop()
        if isinstance(self._stack[-1], Call):
            self._stack[-1].state = state

    def _extend(self, values: list[Any]) -> None:
        target = self._stack[-1]
        (target.items if isinstance(target, Call) else target).extend(values)

    def _append(self, _: Any) -> None:
        self._extend([self._stack.pop()])

    def _appends(self, _: Any) -> None:
        self._extend(self._pop_to_mark())

    def _update(self, flat: list[Any]) -> None:
        target, pairs = self._stack[-1], zip(flat[::2], flat[1::2], strict=True)
        if isinstance(target, Call):
            target.items.extend(pairs)
        else:
            target.update((_as_key(key), value) for key, value in pairs)

    def _set_item(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._update([key, value])

    def _set_items(self, _: Any) -> None:
        self._update(self._pop_to_mark())

    def _persistent(self, _: Any) -> None:
        self._stack.append(Persistent(self._stack.pop()))

    def _extension(self, code: int) -> None:
        self._stack.append(Global("copyreg", f"extension {code}"))


def _as_key(key: Any) -> Any:
    try:
        hash(key)
    except TypeError:
        return str(type(key).__name__)
    return key


_IGNORED: Final = frozenset({"PROTO", "FRAME", "STOP", "READONLY_BUFFER", "NEXT_BUFFER"})
_PUSHES: Final = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
        *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    }
)
_CONSTANTS: Final[dict[str, Callable[[], Any]]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": lambda: Call(Global("builtins", "set"), ()),
    "MARK": lambda: _MARK,
}
_TUPLES: Final = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _made(make: Callable[[list[Any]], Any]) -> Callable[[_Machine, Any], None]:
    """Return the action that makes a container of all back to the mark."""

    def act(machine: _Machine, _: Any) -> None:
        machine._stack.append(make(machine._pop_to_mark()))

    return act


def _pairs(flat: list[Any]) -> dict[Any, Any]:
    return {_as_key(key): value for key, value in zip(flat[::2], flat[1::2], strict=True)}


_ACTIONS: Final[dict[str, Callable[[_Machine, Any], object]]] = {
    "TUPLE": _made(tuple),
    "LIST": _made(list),
    "DICT": _made(_pairs),
    "FROZENSET": _made(lambda items: Call(Global("builtins", "frozenset"), (items,))),
    "POP_MARK": lambda machine, _: machine._pop_to_mark(),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine._get),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine._put),
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), _Machine._extension),
    "MEMOIZE": lambda machine, _: machine._put(len(machine._memo)),
    "DUP": lambda machine, _: machine._stack.append(machine._stack[-1]),
    "POP": lambda machine, _: machine._stack.pop(),
    "GLOBAL": _Machine._global,
    "STACK_GLOBAL": _Machine._stack_global,
    "REDUCE": _Machine._reduce,
    "NEWOBJ": _Machine._reduce,
    "NEWOBJ_EX": _Machine._new_with_keywords,
    "OBJ": _Machine._object,
    "INST": _Machine._instance,
    "BUILD": _Machine._build,
    "APPEND": _Machine._append,
    "APPENDS": _Machine._appends,
    "ADDITEMS": _Machine._appends,
    "SETITEM": _Machine._set_item,
    "SETITEMS": _Machine._set_items,
    "PERSID": lambda machine, argument: machine._stack.append(Persistent(argument)),
    "BINPERSID": _Machine._persistent,
}


def globals_in(value: Any) -> Iterator[Global]:
    """Yield every class and function that would be called, each once."""
    yield from dict.fromkeys(node for node in _nodes(value) if isinstance(node, Global))


def persistents_in(value: Any) -> Iterator[Persistent]:
    """Yield every reference to something outside of the pickle."""
    return (node for node in _nodes(value) if isinstance(node, Persistent))


def _nodes(value: Any) -> Iterator[Any]:
    seen: set[int] = set()
    todo = [value]
    while todo:
        node = todo.pop()
        if isinstance(node, Global):
            yield node
        elif isinstance(node, (dict, list, tuple, Call, Persistent)) and id(node) not in seen:
            seen.add(id(node))
            yield node
            todo.extend(_inside(node))


def _inside(node: Any) -> list[Any]:
    if isinstance(node, dict):
        return [*node, *node.values()]
    if isinstance(node, Call):
        return [node.what, node.args, node.state, *node.items]
    return [node.id] if isinstance(node, Persistent) else [*node]
