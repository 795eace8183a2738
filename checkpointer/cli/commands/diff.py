"""``checkpointer diff``: what changed between two checkpoints."""

from __future__ import annotations

from typing import Annotated, Any

import attrs

from checkpointer._display import count_text, number_text
from checkpointer.cli import options, output
from checkpointer.cli.choose_run import find
from checkpointer.errors import PolicyError
from checkpointer.tools.diff import Change, diff, diff_values
from checkpointer.tools.payloads import Payload, opened

_DIGITS = 4


def diff_command(
    items: Annotated[
        list[str],
        options.argument(
            "[DIRECTORY] A B",
            "Two files or folders; or a directory of checkpoints and two names, steps or aliases.",
            options.complete_name,
        ),
    ],
    access: options.Access,
    other: Annotated[str | None, options.option("--in DIRECTORY", "The directory of B, if it is another one.")] = None,
    match: options.Match = "",
    run: options.Among = None,
    as_json: options.Json = False,
) -> None:
    """Compare two checkpoints tensor by tensor: norm and largest element of the difference, cosine, added, removed.

    Exits with 1 if they differ, as diff does.

    Example: checkpointer diff runs/digits 190 last
    """
    one, two = _sides(items, other, access, run)
    with (
        opened(one) as old,
        opened(two) as new,
        output.progress("comparing", sum(info.bytes for info in old.tensors.values() if match in info.name)) as advance,
    ):
        changes = []
        for change in diff(old, new, match):
            changes.append(change)
            advance(change.before.bytes if change.before else 0)
        values = diff_values(old, new, match)
    if as_json:
        tensors = [attrs.asdict(change) for change in changes]
        output.print_json({"before": one.name, "after": two.name, "tensors": tensors, "values": values})
    else:
        _print(changes, values)
    output.leave_if(any(changes) or bool(values))


def _sides(items: list[str], other: str | None, access: options.Access, run: str | None) -> tuple[Payload, Payload]:
    if len(items) == 2 and other is None:
        first, second = (options.payload(place, access, "diff DIRECTORY A B") for place in items)
        return first, second
    if len(items) != 3:
        msg = f"diff takes two files, or a directory and two checkpoints; {len(items)} were given: {' '.join(items)}"
        raise PolicyError(msg)
    here = options.look(items[0], access)
    there = here if other is None else options.look(other, access)
    one, two = find(here, items[1], run), find(there, items[2], run if other is None else None)
    return Payload.of(here, one), Payload.of(there, two)


def _print(changes: list[Change], values: dict[str, tuple[Any, Any]]) -> None:
    rows = [(change.name, _shape(change), *_numbers(change)) for change in changes if change]
    if rows:
        numbers = ("norm", "relative", "max", "cosine")
        output.print_table(["tensor", "shape", *numbers], rows, right=numbers, folded=[0])
    if values:
        pairs = [(name, str(one), str(two)) for name, (one, two) in values.items()]
        output.print_table(["value", "before", "after"], pairs, folded=[0, 1, 2])
    differ = f"{len(rows)} of {count_text(len(changes), 'tensor')}"
    output.print_line(f"{differ} and {count_text(len(values), 'value')} differ")


def _shape(change: Change) -> str:
    shapes = [" x ".join(map(str, info.shape)) or "-" for info in (change.before, change.after) if info]
    if change.kind in ("added", "removed"):
        return f"{change.kind}: {shapes[0]}"
    return " -> ".join(dict.fromkeys(shapes))


def _numbers(change: Change) -> list[str]:
    if change.kind != "changed":
        return ["", "", "", ""]
    texts = [number_text(value, _DIGITS) for value in (change.norm, change.relative, change.max)]
    return [*texts, f"{change.cosine:.6f}"]
