"""Reads what a pickle says, and runs nothing: to call something is, in here, to note what would have been called.

Python's own unpickler finds classes and calls them, which is why a pickle can run anything. This one has no way to call
or import: a class is its name, and an object is the name of what would make it with the arguments for that.
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
    """What an unpickler would have called, and with what."""

    what: Any
    args: Any
    state: Any = None
    """What would have been put into the object afterwards."""
    items: list[Any] = attrs.field(factory=list)
    """What would have been appended, or set as pairs."""


@attrs.frozen(eq=False)
class Persistent:
    """A reference to something outside of the pickle; torch's are storages."""

    id: Any


class _Mark:
    pass


_MARK: Final = _Mark()


def read_pickle(stream: BinaryIO, limit: int = MAX_OPERATIONS) -> Any:
    """Return what the next pickle of a stream holds: plain data, `Global`, `Call` and `Persistent`.

    Raises:
        CorruptError: If it is not a pickle, or too large to be one of a checkpoint.

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
        return machine.result()
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

    def result(self) -> Any:
        """Return what is left at the end."""
        (value,) = self._stack
        return value

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

    def _forget_to_mark(self, _: Any) -> None:
        self._pop_to_mark()

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

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

    def _append(self, _: Any) -> None:
        value = self._stack.pop()
        self._extend(self._stack[-1], [value])

    def _appends(self, _: Any) -> None:
        values = self._pop_to_mark()
        self._extend(self._stack[-1], values)

    def _extend(self, target: Any, values: list[Any]) -> None:
        if isinstance(target, Call):
            target.items.extend(values)
        else:
            target.extend(values)

    def _set_item(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set(self._stack[-1], [key, value])

    def _set_items(self, _: Any) -> None:
        pairs = self._pop_to_mark()
        self._set(self._stack[-1], pairs)

    def _set(self, target: Any, flat: list[Any]) -> None:
        pairs = zip(flat[::2], flat[1::2], strict=True)
        if isinstance(target, Call):
            target.items.extend(pairs)
        else:
            target.update((_as_key(key), value) for key, value in pairs)

    def _pop(self, _: Any) -> None:
        self._stack.pop()

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


def _get(machine: _Machine, index: int) -> None:
    machine._stack.append(machine._memo[index])


def _pairs(flat: list[Any]) -> dict[Any, Any]:
    return {_as_key(key): value for key, value in zip(flat[::2], flat[1::2], strict=True)}


_ACTIONS: Final[dict[str, Callable[[_Machine, Any], None]]] = {
    "TUPLE": _made(tuple),
    "LIST": _made(list),
    "DICT": _made(_pairs),
    "FROZENSET": _made(lambda items: Call(Global("builtins", "frozenset"), (items,))),
    "POP_MARK": _Machine._forget_to_mark,
    "GET": _get,
    "BINGET": _get,
    "LONG_BINGET": _get,
    "PUT": lambda machine, index: machine._put(index),
    "BINPUT": lambda machine, index: machine._put(index),
    "LONG_BINPUT": lambda machine, index: machine._put(index),
    "MEMOIZE": lambda machine, _: machine._put(len(machine._memo)),
    "DUP": lambda machine, _: machine._stack.append(machine._stack[-1]),
    "POP": _Machine._pop,
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
    "EXT1": _Machine._extension,
    "EXT2": _Machine._extension,
    "EXT4": _Machine._extension,
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
