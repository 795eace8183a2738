"""A sorted sequence that is a value: one item more or less makes another one, which shares all but a few nodes."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import Any, Final, Generic, TypeVar

__all__ = ["Ordered"]

T = TypeVar("T")
Key = tuple[Any, ...]

WIDTH: Final = 32
"""Most children of a node; one with less than a quarter of that is merged with its neighbour."""


class _Node:
    """A node of a B+ tree: a leaf has items, others have nodes, and the first key below each."""

    __slots__ = ("children", "counts", "keys", "size")

    def __init__(self, keys: tuple[Key, ...], children: tuple[Any, ...], counts: tuple[int, ...] | None) -> None:
        self.keys = keys
        self.children = children
        self.counts = counts
        """Items below each child; None in a leaf."""
        self.size = len(children) if counts is None else sum(counts)


class Ordered(Generic[T]):
    """Items in the order of their keys, as an immutable B+ tree: each operation is O(log n), its copy included.

    Keys are tuples that compare with one another. Of items with equal keys the last one counts.

    Example:
        >>> words = Ordered([((4,), "four"), ((1,), "one")])
        >>> more = words.put((2,), "two")
        >>> list(more), more.rank((4,)), list(words)
        (['one', 'two', 'four'], 2, ['one', 'four'])
    """

    __slots__ = ("_root",)

    def __init__(self, items: Iterable[tuple[Key, T]] = ()) -> None:
        by_key = dict(items)
        keys = tuple(sorted(by_key))
        values = tuple(by_key[key] for key in keys)
        nodes = [_Node(keys[i : i + WIDTH], values[i : i + WIDTH], None) for i in range(0, len(keys), WIDTH)]
        while len(nodes) > 1:
            nodes = [_branch(tuple(nodes[i : i + WIDTH])) for i in range(0, len(nodes), WIDTH)]
        self._root = nodes[0] if nodes else _Node((), (), None)

    def put(self, key: Key, item: T) -> Ordered[T]:
        """Return the sequence with this item, in place of one that has the same key."""
        nodes = _put(self._root, key, item)
        return _with_root(nodes[0] if len(nodes) == 1 else _branch(nodes))

    def drop(self, key: Key) -> Ordered[T]:
        """Return the sequence without the item of this key; itself if there is none."""
        root = _drop(self._root, key)
        if root is self._root:
            return self
        while root.counts is not None and len(root.children) == 1:
            root = root.children[0]
        return _with_root(root)

    def get(self, key: Key) -> T | None:
        """Return the item of this key, or None."""
        node = self._root
        while node.counts is not None:
            node = node.children[max(bisect_right(node.keys, key) - 1, 0)]
        i = bisect_left(node.keys, key)
        item: T | None = node.children[i] if i < len(node.keys) and node.keys[i] == key else None
        return item

    def rank(self, key: Key) -> int:
        """Return how many items come before this key, whether or not it is there."""
        node, before = self._root, 0
        while node.counts is not None:
            i = max(bisect_left(node.keys, key) - 1, 0)
            before += sum(node.counts[:i])
            node = node.children[i]
        return before + bisect_left(node.keys, key)

    def __getitem__(self, place: int) -> T:
        """Return the item at a place, 0-based; a negative one counts from the end."""
        place = place + len(self) if place < 0 else place
        if not 0 <= place < len(self):
            msg = f"no item {place}: there are {len(self)}"
            raise IndexError(msg)
        return next(self.starting_at(place))

    def starting_at(self, place: int) -> Iterator[T]:
        """Yield the items from a place on, 0-based; one that is not there yields nothing."""
        return _walk(self._root, place)

    def __iter__(self) -> Iterator[T]:
        return _walk(self._root, 0)

    def __reversed__(self) -> Iterator[T]:
        return _walk_back(self._root)

    def __len__(self) -> int:
        return self._root.size


def _with_root(root: _Node) -> Ordered[Any]:
    made: Ordered[Any] = Ordered.__new__(Ordered)
    made._root = root
    return made


def _branch(children: tuple[_Node, ...]) -> _Node:
    return _Node(tuple(node.keys[0] for node in children), children, tuple(node.size for node in children))


def _spliced(node: _Node, i: int, j: int, new: tuple[_Node, ...]) -> _Node:
    """Return a branch with others in place of its children from ``i`` to ``j``."""
    assert node.counts is not None, "a leaf has no nodes below it"
    return _Node(
        node.keys[:i] + tuple(child.keys[0] for child in new) + node.keys[j:],
        node.children[:i] + new + node.children[j:],
        node.counts[:i] + tuple(child.size for child in new) + node.counts[j:],
    )


def _split(node: _Node) -> tuple[_Node, ...]:
    if len(node.children) <= WIDTH:
        return (node,)
    half = len(node.children) // 2
    counts = node.counts
    return (
        _Node(node.keys[:half], node.children[:half], None if counts is None else counts[:half]),
        _Node(node.keys[half:], node.children[half:], None if counts is None else counts[half:]),
    )


def _put(node: _Node, key: Key, item: Any) -> tuple[_Node, ...]:
    """Return the node with the item, as one or two nodes."""
    if node.counts is None:
        i = bisect_left(node.keys, key)
        j = i + (i < len(node.keys) and node.keys[i] == key)
        keys, children = (*node.keys[:i], key, *node.keys[j:]), (*node.children[:i], item, *node.children[j:])
        return _split(_Node(keys, children, None))
    i = max(bisect_right(node.keys, key) - 1, 0)
    return _split(_spliced(node, i, i + 1, _put(node.children[i], key, item)))


def _drop(node: _Node, key: Key) -> _Node:
    """Return the node without the key, itself if it is not there; it may be left with too little, or nothing."""
    if node.counts is None:
        i = bisect_left(node.keys, key)
        if i == len(node.keys) or node.keys[i] != key:
            return node
        return _Node(node.keys[:i] + node.keys[i + 1 :], node.children[:i] + node.children[i + 1 :], None)
    i = max(bisect_right(node.keys, key) - 1, 0)
    child = _drop(node.children[i], key)
    if child is node.children[i]:
        return node
    if not child.children:
        return _spliced(node, i, i + 1, ())
    if len(child.children) >= WIDTH // 4 or len(node.children) == 1:
        return _spliced(node, i, i + 1, (child,))
    first = max(i - 1, 0)
    pair = (node.children[first], child) if first < i else (child, node.children[1])
    return _spliced(node, first, first + 2, _split(_joined(*pair)))


def _joined(left: _Node, right: _Node) -> _Node:
    if left.counts is None or right.counts is None:
        return _Node(left.keys + right.keys, left.children + right.children, None)
    return _Node(left.keys + right.keys, left.children + right.children, left.counts + right.counts)


def _walk(node: _Node, place: int) -> Iterator[Any]:
    if node.counts is None:
        yield from node.children[place:]
        return
    for child, count in zip(node.children, node.counts, strict=True):
        if place < count:
            yield from _walk(child, place)
        place = max(place - count, 0)


def _walk_back(node: _Node) -> Iterator[Any]:
    if node.counts is None:
        yield from reversed(node.children)
        return
    for child in reversed(node.children):
        yield from _walk_back(child)
