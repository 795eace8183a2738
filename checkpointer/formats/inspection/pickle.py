"""Reads what a pickle says, and runs nothing: an instruction to call something is noted, not carried out.

Python's own unpickler finds classes and calls them, so a pickle can run anything. This one cannot call or import: a
class is its name, and an object is the name and the arguments of the call that would make it.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterator, Sequence
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
    args: tuple[Any, ...]
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
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count > limit:
                msg = f"the pickle has more than {limit} instructions; no checkpoint's has"
                raise CorruptError(msg)
            _step(opcode, argument, stack, memo)
        (value,) = stack
        return value
    except (CorruptError, OSError, MemoryError):
        raise
    except Exception as error:  # Damaged bytes fail anywhere: IndexError, KeyError, ValueError, TypeError...
        msg = f"it cannot be read as a pickle ({type(error).__name__}: {error})"
        raise CorruptError(msg) from error


def _step(opcode: pickletools.OpcodeInfo, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    """Carry out one instruction. `pickletools` says which of them takes how much from the stack."""
    name, takes = opcode.name, opcode.stack_before
    if name in _PUTS:
        memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
    elif name in _GETS:
        stack.append(memo[argument])
    elif name == "DUP":
        stack.append(stack[-1])
    elif name not in _IGNORED:
        taken: list[Any] = []
        if pickletools.markobject in takes:
            items: list[Any] = []
            while (value := stack.pop()) is not _MARK:
                items.append(value)
            taken, takes = [items[::-1]], takes[: takes.index(pickletools.markobject)]
        for _ in takes:
            taken.insert(0, stack.pop())
        made = _ACTIONS[name](argument, *taken)
        if opcode.stack_after:
            stack.append(made)


def _global(argument: str) -> Global:
    module, _, name = argument.partition(" ")
    return Global(_PYTHON_2.get(module, module), name)


def _call(_: Any, what: Any, args: Any) -> Call:
    return Call(what, args if isinstance(args, tuple) else (args,))


def _build(_: Any, target: Any, state: Any) -> Any:
    if isinstance(target, Call):
        target.state = state
    return target


def _extend(target: Any, values: list[Any]) -> Any:
    (target.items if isinstance(target, Call) else target).extend(values)
    return target


def _update(target: Any, flat: Sequence[Any]) -> Any:
    pairs = zip(flat[::2], flat[1::2], strict=True)
    if isinstance(target, Call):
        target.items.extend(pairs)
    else:
        target.update((_as_key(key), value) for key, value in pairs)
    return target


def _as_key(key: Any) -> Any:
    try:
        hash(key)
    except TypeError:
        return str(type(key).__name__)
    return key


_IGNORED: Final = frozenset({"PROTO", "FRAME", "STOP", "READONLY_BUFFER", "NEXT_BUFFER"})
_PUTS: Final = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})
_GETS: Final = frozenset({"GET", "BINGET", "LONG_BINGET"})
_PUSHES: Final = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
)
_ACTIONS: Final[dict[str, Callable[..., Any]]] = {
    **dict.fromkeys(_PUSHES, lambda argument: argument),
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "MARK": lambda _: _MARK,
    **dict.fromkeys(("POP", "POP_MARK"), lambda *_: None),
    "EMPTY_DICT": lambda _: {},
    "EMPTY_LIST": lambda _: [],
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_SET": lambda _: Call(Global("builtins", "set"), ()),
    "DICT": lambda _, flat: _update({}, flat),
    "LIST": lambda _, items: items,
    "TUPLE": lambda _, items: tuple(items),
    **dict.fromkeys(("TUPLE1", "TUPLE2", "TUPLE3"), lambda _, *items: items),
    "FROZENSET": lambda _, items: Call(Global("builtins", "frozenset"), (items,)),
    "APPEND": lambda _, target, item: _extend(target, [item]),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda _, target, items: _extend(target, items)),
    "SETITEM": lambda _, target, *pair: _update(target, pair),
    "SETITEMS": lambda _, target, flat: _update(target, flat),
    "GLOBAL": _global,
    "STACK_GLOBAL": lambda _, module, name: Global(str(module), str(name)),
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), lambda code: Global("copyreg", f"extension {code}")),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _call),
    "NEWOBJ_EX": lambda _, what, args, keywords: Call(what, (args, keywords)),
    "OBJ": lambda _, items: Call(items[0], tuple(items[1:])),
    "INST": lambda argument, items: Call(_global(argument), tuple(items)),
    "BUILD": _build,
    "PERSID": Persistent,
    "BINPERSID": lambda _, identity: Persistent(identity),
}
"""What each other instruction makes of its argument and of what it takes from the stack."""


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
