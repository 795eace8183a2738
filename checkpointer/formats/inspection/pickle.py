"""Reads what a pickle says, and runs nothing: an instruction to call something is noted, not carried out.

Python's own unpickler finds classes and calls them, so a pickle can run anything. This one cannot call or import: a
class is its name, and an object is the name and the arguments of the call that would make it. Plain containers and
numbers are themselves.
"""

from __future__ import annotations

import pickletools
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, BinaryIO, Final

import attrs

from checkpointer.errors import CorruptError

MAX_OPERATIONS: Final = 60_000_000
"""A pickle of more instructions than this is refused."""
_MAX_KEY_ITEMS: Final = 1000
"""A tuple with more items, those of tuples in it included, is not a key: its class stands for it."""
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


class Size(tuple[Any, ...]):
    """A ``torch.Size``."""


_MARK: Final = object()


def read_pickle(stream: BinaryIO) -> Any:
    """Return what the next pickle of a stream holds: plain data, `Global`, `Call` and `Persistent`.

    Example:
        >>> import io, pickle
        >>> read_pickle(io.BytesIO(pickle.dumps({"step": 400, "losses": [0.5]})))
        {'step': 400, 'losses': [0.5]}
    """
    return read_names(stream)[0]


def read_names(stream: BinaryIO) -> tuple[Any, list[Global | Persistent]]:
    """Return what `read_pickle` does; and every class, function and reference to the outside, each once."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    names: dict[Global | Persistent, None] = {}
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count > MAX_OPERATIONS:
                msg = f"the pickle has more than {MAX_OPERATIONS} instructions; no checkpoint's has"
                raise CorruptError(msg)
            made = _step(opcode, argument, stack, memo)
            name = made.what if isinstance(made, Call) else made
            if isinstance(name, (Global, Persistent)):
                names[name] = None
        (value,) = stack
        return value, [*names]
    except (CorruptError, OSError, MemoryError):
        raise
    except Exception as error:  # Damaged bytes fail anywhere: IndexError, KeyError, ValueError, TypeError...
        msg = f"it cannot be read as a pickle ({type(error).__name__}: {error})"
        raise CorruptError(msg) from error


def _step(opcode: pickletools.OpcodeInfo, argument: Any, stack: list[Any], memo: dict[int, Any]) -> Any:
    """Carry out one instruction and return what it made. `pickletools` says what each takes from the stack."""
    name, takes = opcode.name, opcode.stack_before
    if name in _IGNORED:
        return None
    if name in _PUTS:
        memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        return None
    if name in _GETS:
        stack.append(memo[argument])
        return None
    if name == "DUP":
        stack.append(stack[-1])
        return None
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
    return made


def _global(argument: str) -> Global:
    module, _, name = argument.partition(" ")
    return Global(_PYTHON_2.get(module, module), name)


def _call(what: Any, args: Any) -> Any:
    """Return the container or number that a call makes, or a note of the call."""
    args = args if isinstance(args, tuple) else (args,)
    if isinstance(what, Global):
        name = what.module, what.name
        if name in _MAPPINGS:
            made = _MAPPINGS[name]()
            for arg in args:
                # Python 2 gives the items of an OrderedDict to its constructor.
                pairs = arg.items() if isinstance(arg, dict) else arg if isinstance(arg, list) else ()
                _set(made, (pair for pair in pairs if isinstance(pair, (tuple, list)) and len(pair) == 2))
            return made
        if name in _SEQUENCES:
            return _SEQUENCES[name]([item for arg in args if isinstance(arg, (list, tuple, set)) for item in arg])
        value = _plain(name, args)
        if value is not None:
            return value
    return Call(what, args)


def _plain(name: tuple[str, str], args: tuple[Any, ...]) -> Any:
    match name, args:
        case ("builtins", "complex"), (float() | int() as real, float() | int() as imaginary):
            return complex(real, imaginary)
        case ("_codecs", "encode"), (str(text), "latin1"):
            return text.encode("latin1")
        case (
            ("numpy.core.multiarray" | "numpy._core.multiarray", "scalar"),
            (Call(what=Global(name="dtype"), args=(dtype, *_), state=state), bytes(data)),
        ):
            code = _CODES.get(str(dtype))
            # The state of a dtype is (version, byte order, ...).
            order = state[1] if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">") else "="
            if code is not None and struct.calcsize(code) == len(data):
                return struct.unpack(order + code, data)[0]
    return None


def _build(_: Any, target: Any, state: Any) -> Any:
    if isinstance(target, Call):
        target.state = state
    elif isinstance(target, OrderedDict) and isinstance(state, dict) and "_metadata" in state:
        target._metadata = state["_metadata"]  # type: ignore[attr-defined]
    return target


def _extend(target: Any, values: list[Any]) -> Any:
    if isinstance(target, set):
        target.update(map(_as_key, values))
    else:
        (target.items if isinstance(target, Call) else target).extend(values)
    return target


def _update(target: Any, flat: Sequence[Any]) -> Any:
    pairs = zip(flat[::2], flat[1::2], strict=True)
    if isinstance(target, Call):
        target.items.extend(pairs)
    else:
        _set(target, pairs)
    return target


def _set(target: dict[Any, Any], pairs: Iterable[Sequence[Any]]) -> None:
    for key, value in pairs:
        target[_as_key(key)] = value


def _as_key(key: Any) -> Any:
    """Return a key of a mapping; hashing a tuple that is deep, or repeats one tuple often, could end the process."""
    todo, left = [key], _MAX_KEY_ITEMS
    while todo and left:
        left -= 1
        value = todo.pop()
        todo.extend(value if isinstance(value, tuple) else ())
    try:
        hash(None if todo else key)
    except TypeError:
        todo = [key]
    return type(key).__name__ if todo else key


_MAPPINGS: Final[dict[tuple[str, str], Callable[[], dict[Any, Any]]]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "Counter"): Counter,
    ("collections", "defaultdict"): dict,  # Its function may be of any kind.
}
_SEQUENCES: Final[dict[tuple[str, str], Callable[[list[Any]], Any]]] = {
    ("builtins", "set"): lambda items: set(map(_as_key, items)),
    ("builtins", "frozenset"): lambda items: frozenset(map(_as_key, items)),
    ("builtins", "list"): list,
    ("torch", "Size"): Size,
}
CONTAINERS: Final = {*_MAPPINGS, *_SEQUENCES, ("builtins", "complex"), ("torch", "device"), ("_codecs", "encode")}
"""Module and name of what makes containers and plain values."""
_TYPES: Final = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
_CODES: Final = dict(zip(_TYPES, "?bhiqBHIQefd", strict=True))
"""The code in `struct` of each numpy dtype."""
_IGNORED: Final = frozenset({"PROTO", "FRAME", "STOP", "READONLY_BUFFER", "NEXT_BUFFER"})
_PUTS: Final = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})
_GETS: Final = frozenset({"GET", "BINGET", "LONG_BINGET"})
_PUSHES: Final = (
    code.name
    for code in pickletools.opcodes
    if code.arg and not code.stack_before and code.stack_after and code.stack_after != [pickletools.anyobject]
)
"""Instructions that push the number, text or bytes that is their argument."""
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
    "EMPTY_SET": lambda _: set(),
    "DICT": lambda _, flat: _update({}, flat),
    "LIST": lambda _, items: items,
    "TUPLE": lambda _, items: tuple(items),
    **dict.fromkeys(("TUPLE1", "TUPLE2", "TUPLE3"), lambda _, *items: items),
    "FROZENSET": lambda _, items: frozenset(map(_as_key, items)),
    "APPEND": lambda _, target, item: _extend(target, [item]),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda _, target, items: _extend(target, items)),
    "SETITEM": lambda _, target, *pair: _update(target, pair),
    "SETITEMS": lambda _, target, flat: _update(target, flat),
    "GLOBAL": _global,
    "STACK_GLOBAL": lambda _, module, name: Global(str(module), str(name)),
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), lambda code: Global("copyreg", f"extension {code}")),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda _, what, args: _call(what, args)),
    "NEWOBJ_EX": lambda _, what, args, keywords: Call(what, (args, keywords)),
    "OBJ": lambda _, items: _call(items[0], tuple(items[1:])),
    "INST": lambda argument, items: _call(_global(argument), tuple(items)),
    "BUILD": _build,
    "PERSID": Persistent,
    "BINPERSID": lambda _, identity: Persistent(identity),
}
"""What each other instruction makes of its argument and of what it takes from the stack."""
