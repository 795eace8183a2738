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
from checkpointer.formats.inspection.key_search import MANY, KeySearch
from checkpointer.formats.inspection.work_limit import COPY, STEP, Work

MAX_OPERATIONS: Final = 60_000_000
"""A pickle of more instructions than this is refused."""
MAX_KEY_ITEMS: Final = 1000
"""A tuple with more items, those of tuples in it included, is refused as a key."""
MAX_SAME_HASHES: Final = 64
"""If more tuples than these have one hash in a container, they were made for it: each costs a comparison with all."""
MAX_NAME: Final = 1024
"""Characters of the name of a module or class at most."""
MAX_BITS: Final = 2040
"""A larger whole number is not read. A safe load by torch refuses it too."""
_KEY_BITS: Final = 64
"""A larger whole number is not a key: many of them can have one hash."""
_DENSE_BITS: Final = 16
"""Smaller numbers have a place each in a large container."""
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


_Actions = dict[str, Callable[..., Any]]
_MARK: Final = object()
_HUGE: Final = "a number of very many digits"


def read_pickle(stream: BinaryIO) -> Any:
    """Return what the next pickle of a stream holds: plain data, `Global`, `Call` and `Persistent`.

    Example:
        >>> import io, pickle
        >>> read_pickle(io.BytesIO(pickle.dumps({"step": 400, "losses": [0.5]})))
        {'step': 400, 'losses': [0.5]}
    """
    return read_made(stream, Work.for_bytes(0))[0]


def read_made(stream: BinaryIO, work: Work) -> tuple[Any, list[Any]]:
    """Return what `read_pickle` does; and every `Global`, `Call` and `Persistent`, in the order of the pickle."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    noted: list[Any] = []
    actions = _actions(_Containers(work))
    steps: dict[bytes, Any] = {code: (*step, actions.get(step[0])) for code, step in _STEPS.items()}
    read, count = stream.read, 0
    try:
        while (code := read(1)) != _STOP:
            if code not in steps:
                msg = f"it has the instruction {code!r}, which there is not" if code else "it was cut"
                raise CorruptError(msg)
            name, reader, takes, has_mark, pushes, action = steps[code]
            argument: Any = None if reader is None else reader(stream)
            count += 1
            if count > MAX_OPERATIONS:
                msg = f"the pickle has more than {MAX_OPERATIONS} instructions; no checkpoint's has"
                raise CorruptError(msg)
            if name in _GETS:
                stack.append(memo[argument])
            elif name in _PUTS:
                memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
            elif name not in _IGNORED:
                taken = _taken(stack, takes, has_mark=has_mark) if takes or has_mark else ()
                made = stack[-1] if name == "DUP" else action(argument, *taken)
                if pushes:
                    stack.append(made)
                if type(made) in _NOTED:
                    noted.append(made)
        (value,) = stack
        return value, noted
    except (CorruptError, OSError, MemoryError):
        raise
    except Exception as error:  # Damaged bytes fail anywhere: IndexError, KeyError, ValueError, TypeError...
        msg = f"it cannot be read as a pickle ({type(error).__name__}: {error})"
        raise CorruptError(msg) from error


def _taken(stack: list[Any], takes: int, *, has_mark: bool) -> Sequence[Any]:
    """Take values from the stack: those above the mark as one list, and so many below it."""
    taken: list[Any] = []
    if has_mark:
        items: list[Any] = []
        while (value := stack.pop()) is not _MARK:
            items.append(value)
        taken = [items[::-1]]
    for _ in range(takes):
        taken.insert(0, stack.pop())
    return taken


def _pushed(argument: Any) -> Any:
    return Call(_HUGE, ()) if isinstance(argument, int) and argument.bit_length() > MAX_BITS else argument


def _global(argument: str) -> Global:
    module, _, name = argument.partition(" ")
    return _named(module, name)


def _named(module: Any, name: Any) -> Global:
    if not (isinstance(module, str) and isinstance(name, str) and len(module) + len(name) <= MAX_NAME):
        msg = f"the name of a class is a {type(name).__name__}, or longer than {MAX_NAME} characters"
        raise CorruptError(msg)
    return Global(_PYTHON_2.get(module, module), name)


def _plain(name: tuple[str, str], args: tuple[Any, ...]) -> Any:
    match name, args:
        case ("builtins", "complex"), (float() | int() as real, float() | int() as imaginary):
            return complex(real, imaginary)
        case (
            ("numpy.core.multiarray" | "numpy._core.multiarray", "scalar"),
            (Call(what=Global(name="dtype"), args=(str(dtype), *_), state=state), bytes(data)),
        ):
            code = _CODES.get(dtype)
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


@attrs.define
class _Containers:
    """Makes and fills containers. What is copied, hashed and compared for it is counted."""

    work: Work
    _hashes: Counter[tuple[int, int]] = attrs.field(factory=Counter, init=False)
    """How many tuples of each hash a container got as keys, by the container's id."""
    _searches: dict[int, KeySearch] = attrs.field(factory=dict, init=False)
    """Of each large container that got a large number as a key, by the container's id."""

    def call(self, what: Any, args: Any) -> Any:
        """Return the container or number that a call makes, or a note of the call."""
        args = args if isinstance(args, tuple) else (args,)
        if not isinstance(what, Global):
            return Call(what, args)
        name = what.module, what.name
        if name in _MAPPINGS:
            made = _MAPPINGS[name]()
            for arg in args:
                # Python 2 gives the items of an OrderedDict to its constructor.
                pairs = arg.items() if isinstance(arg, dict) else arg if isinstance(arg, list) else ()
                self.work.spend(COPY * len(pairs))
                self.put(made, (pair for pair in pairs if isinstance(pair, (tuple, list)) and len(pair) == 2))
            return made
        if name in _SEQUENCES:
            copied = [arg for arg in args if isinstance(arg, (list, tuple, set, frozenset))]
            self.work.spend(COPY * sum(map(len, copied)))
            items = (item for arg in copied for item in arg)
            return self.make_set(_SEQUENCES[name], items) if "set" in what.name else _SEQUENCES[name](items)
        if name == ("_codecs", "encode") and len(args) == 2 and isinstance(args[0], str) and args[1] == "latin1":
            self.work.spend(len(args[0]))
            return args[0].encode("latin1")
        value = _plain(name, args)
        return Call(what, args) if value is None else value

    def make_set(self, kind: Callable[[Any], Any], items: Iterable[Any]) -> Any:
        """Return a set or frozenset."""
        found: set[Any] = set()
        self.extend(found, items)
        return kind(found)

    def extend(self, target: Any, values: Iterable[Any]) -> Any:
        """Add items to a list or set, or to what a call makes."""
        if isinstance(target, set):
            target.update(self.key(target, value) for value in values)
        else:
            (target.items if isinstance(target, Call) else target).extend(values)
        return target

    def update(self, target: Any, flat: Sequence[Any]) -> Any:
        """Add keys and values, which come in turns."""
        pairs = zip(flat[::2], flat[1::2], strict=True)
        if isinstance(target, Call):
            target.items.extend(pairs)
        else:
            self.put(target, pairs)
        return target

    def put(self, target: dict[Any, Any], pairs: Iterable[Sequence[Any]]) -> None:
        """Add keys with their values."""
        for key, value in pairs:
            target[self.key(target, key)] = value

    def key(self, target: Any, key: Any) -> Any:
        """Return a key for a container: the key itself, or the name of its class if Python cannot hash it."""
        key = self._hashable(target, key)
        if len(target) >= MANY and key not in target:
            search = self._searches.get(id(target))
            if search is not None:
                self.work.spend(STEP * search.add(hash(key)))
            elif type(key) is int and key.bit_length() > _DENSE_BITS:
                search = self._searches[id(target)] = KeySearch(target)
                self.work.spend(STEP * (search.steps + search.add(hash(key))))
        return key

    def _hashable(self, target: Any, key: Any) -> Any:
        kind = type(key)
        if kind is str or kind in _SAFE_KEYS or (kind is int and key.bit_length() <= _KEY_BITS):
            return key
        if kind not in (tuple, Size, frozenset, complex) or not self._is_hashed(key):
            return kind.__name__
        value = hash(key)
        self._hashes[id(target), value] += 1
        if self._hashes[id(target), value] > MAX_SAME_HASHES:
            msg = f"more than {MAX_SAME_HASHES} keys of a mapping have one hash; no checkpoint's have"
            raise CorruptError(msg)
        return key

    def _is_hashed(self, key: Any) -> bool:
        """Return whether a key can be hashed; raise if it is a tuple that is deep, or repeats one tuple often."""
        todo, left = [key], MAX_KEY_ITEMS
        while todo:
            left -= 1
            value = todo.pop()
            if left < 0 or (isinstance(value, tuple) and len(value) > left):
                msg = f"a key of a mapping is a tuple of more than {MAX_KEY_ITEMS} items; no checkpoint has one"
                raise CorruptError(msg)
            if isinstance(value, tuple):
                todo.extend(value)
            elif not isinstance(value, _IN_KEYS):
                return False
        self.work.spend(COPY * (MAX_KEY_ITEMS - left))
        return True


_MAPPINGS: Final[dict[tuple[str, str], Callable[[], dict[Any, Any]]]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "Counter"): Counter,
    ("collections", "defaultdict"): dict,  # Its function may be of any kind.
}
_SEQUENCES: Final[dict[tuple[str, str], Callable[[Any], Any]]] = {
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "list"): list,
    ("torch", "Size"): Size,
}
CONTAINERS: Final = {*_MAPPINGS, *_SEQUENCES, ("builtins", "complex"), ("torch", "device"), ("_codecs", "encode")}
"""Module and name of what makes containers and plain values."""
_TYPES: Final = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
_CODES: Final = dict(zip(_TYPES, "?bhiqBHIQefd", strict=True))
"""The code in `struct` of each numpy dtype."""
_IN_KEYS: Final = (str, bytes, int, float, complex, frozenset, type(None), Global)
"""What a tuple holds that is a key."""
_SAFE_KEYS: Final = frozenset({bytes, float, bool, type(None), Global, Call, Persistent})
"""Classes whose hashes a file cannot choose, or hardly."""
_STOP: Final = b"."
_IGNORED: Final = frozenset({"PROTO", "FRAME", "READONLY_BUFFER", "NEXT_BUFFER"})
_PUTS: Final = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})
_GETS: Final = frozenset({"GET", "BINGET", "LONG_BINGET"})
_NOTED: Final = frozenset({Global, Call, Persistent})


def _taken_by(code: pickletools.OpcodeInfo) -> tuple[int, bool, bool]:
    """Return how many values an instruction takes, whether it takes those above a mark too, and whether it pushes."""
    takes = code.stack_before
    has_mark = pickletools.markobject in takes
    count = takes.index(pickletools.markobject) if has_mark else len(takes)
    return 0 if code.name == "DUP" else count, has_mark, bool(code.stack_after)


_STEPS: Final[dict[bytes, tuple[str, Callable[[Any], Any] | None, int, bool, bool]]] = {
    code.code.encode("latin-1"): (code.name, code.arg.reader if code.arg else None, *_taken_by(code))
    for code in pickletools.opcodes
}
"""By its byte: the name of each instruction, what reads its argument, and what it takes, as `pickletools` says it."""
_PUSHES: Final = tuple(
    code.name
    for code in pickletools.opcodes
    if code.arg and not code.stack_before and code.stack_after and code.stack_after != [pickletools.anyobject]
)
"""Instructions that push the number, text or bytes that is their argument."""
_PLAIN: Final[_Actions] = {
    **dict.fromkeys(_PUSHES, lambda argument: argument),
    **dict.fromkeys(("INT", "LONG", "LONG1", "LONG4"), _pushed),
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "MARK": lambda _: _MARK,
    **dict.fromkeys(("POP", "POP_MARK"), lambda *_: None),
    "EMPTY_DICT": lambda _: {},
    "EMPTY_LIST": lambda _: [],
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_SET": lambda _: set(),
    "LIST": lambda _, items: items,
    "TUPLE": lambda _, items: tuple(items),
    **dict.fromkeys(("TUPLE1", "TUPLE2", "TUPLE3"), lambda _, *items: items),
    "GLOBAL": _global,
    "STACK_GLOBAL": lambda _, module, name: _named(module, name),
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), lambda code: Global("copyreg", f"extension {code}")),
    "NEWOBJ_EX": lambda _, what, args, keywords: Call(what, (args, keywords)),
    "BUILD": _build,
    "PERSID": Persistent,
    "BINPERSID": lambda _, identity: Persistent(identity),
}
"""What each other instruction makes of its argument and of what it takes from the stack, except those of `_actions`."""


def _actions(to: _Containers) -> _Actions:
    """Return what each instruction makes, also those that fill containers or call something."""
    return {
        **_PLAIN,
        "DICT": lambda _, flat: to.update({}, flat),
        "FROZENSET": lambda _, items: to.make_set(frozenset, items),
        "APPEND": lambda _, target, item: to.extend(target, [item]),
        **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda _, target, items: to.extend(target, items)),
        "SETITEM": lambda _, target, *pair: to.update(target, pair),
        "SETITEMS": lambda _, target, flat: to.update(target, flat),
        **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda _, what, args: to.call(what, args)),
        "OBJ": lambda _, items: to.call(items[0], tuple(items[1:])),
        "INST": lambda argument, items: to.call(_global(argument), tuple(items)),
    }
