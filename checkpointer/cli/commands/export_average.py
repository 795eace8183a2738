"""``checkpointer export`` and ``average``: the weights of one checkpoint, or the mean of several, as a file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Annotated

import attrs

from checkpointer._display import count_text, size_text, some_of
from checkpointer.cli import options, output
from checkpointer.cli.choose_run import best_first, choose, find, find_all
from checkpointer.errors import PolicyError, RestoreError
from checkpointer.formats.export import WeightsFormat, format_by_name, write_weights
from checkpointer.formats.inspection.find_weights import Weights, weights_of
from checkpointer.formats.inspection.tensors import Tensors
from checkpointer.tools.average import average
from checkpointer.tools.payloads import Payload, opened


@attrs.frozen(kw_only=True)
class File:
    """Options of the file that is written."""

    format: Annotated[
        WeightsFormat | None,
        options.option("--format", "Without it OUT's extension decides (.safetensors; .pt, .pth, .ckpt, .bin)."),
    ] = None
    only: Annotated[
        str | None,
        options.option(
            "--only KEY",
            "The place of the weights: a key such as model or state_dict.encoder, or a file; '' for all tensors.",
        ),
    ] = None
    as_json: options.Json = False


def export_command(
    items: Annotated[
        list[str],
        options.argument(
            "[DIRECTORY] NAME OUT",
            "A file or folder, or a directory of checkpoints and a name, step or alias; then the new file.",
            options.complete_name,
        ),
    ],
    file: File,
    access: options.Access,
    run: options.Among = None,
) -> None:
    """Write a checkpoint's weights as safetensors or a flat torch file, tensor by tensor. It is verified first.

    Example: checkpointer export runs/digits best model.safetensors
    """
    if len(items) not in (2, 3):
        msg = f"export takes FILE OUT, or DIRECTORY NAME OUT; {len(items)} were given: {' '.join(items)}"
        raise PolicyError(msg)
    place, out = items[0], items[-1]
    options.check_out(out, access)
    catalog = options.look(place, access) if len(items) == 3 else None
    if catalog is None:
        payload = options.payload(place, access, f"export {place} NAME {out}")
    else:
        payload = Payload.of(catalog, find(catalog, items[1], run))
    _write([payload], out, file, lambda sources: sources[0][1])
    if catalog is not None:
        # The checkpoint that an alias was meant for may be among these.
        output.say_damaged(catalog)


def average_command(
    directory: options.Directory,
    file: File,
    access: options.Access,
    ranking: options.Ranking,
    names: Annotated[
        list[str] | None,
        options.argument("[NAME]...", "Names, steps or aliases; or use --best.", options.complete_name),
    ] = None,
    out: Annotated[str, options.option("--out -o OUT", "The new file.", show_default=False)] = "",
    best: Annotated[int | None, options.option("--best K", "The best K.", min=1)] = None,
    run: options.Run = None,
) -> None:
    """Average the weights of the named checkpoints, or of the best K by a metric. Each is verified first.

    The mean is computed tensor by tensor in double precision; counters are those of the first checkpoint.

    Example: checkpointer average runs/digits --best 3 --by val_loss --mode min -o mean.safetensors
    """
    if not out:
        msg = "--out is missing; name the new file, such as --out averaged.safetensors"
        raise PolicyError(msg)
    if bool(names) == (best is not None):
        msg = (
            "name the checkpoints, or pass --best K; --by METRIC --mode min or max, or a --policy, says which are best"
        )
        raise PolicyError(msg)
    options.check_out(out, access)
    catalog = options.look(directory, access)
    records = find_all(catalog, names or (), run)
    if best is not None:
        records = best_first(choose(catalog, run), ranking)[:best]
        if len(records) < best:
            output.say(f"the run has {count_text(len(records), 'ranked checkpoint')}; their mean is taken")
    _write([Payload.of(catalog, record) for record in records], out, file, average)
    for record in () if file.as_json else records:
        output.print_written(out, f"  {record.name}")


def _weights(contents: Tensors, only: str | None, name: str) -> Weights:
    """Return the weights of a checkpoint; an error names it."""
    try:
        return weights_of(contents, only)
    except RestoreError as error:
        msg = f"{name}: {error}"
        raise type(error)(msg) from error


def _write(
    payloads: list[Payload], out: str, file: File, combined: Callable[[list[tuple[str, Weights]]], Weights]
) -> None:
    """Verify what has a record, write the combined weights, and say what was written."""
    format = file.format or format_by_name(out)
    if file.as_json and output.is_stdout(out):
        msg = f"{out} gets the weights, and --json prints to it too; leave one of them out"
        raise PolicyError(msg)
    with contextlib.ExitStack() as stack:
        opening = ((payload.name, stack.enter_context(opened(payload))) for payload in payloads)
        weights = combined([(name, _weights(contents, file.only, name)) for name, contents in opening])
        advance = stack.enter_context(output.progress("writing", sum(info.bytes for info in weights.tensors.values())))

        def read(name: str) -> object:
            advance(weights.tensors[name].bytes)
            return weights.read(name)

        size = write_weights(out, weights.tensors, read, format=format)
    left_out, count, names = [*weights.values], len(weights.tensors), [payload.name for payload in payloads]
    if file.as_json:
        data = {"path": out, "bytes": size, "tensors": count, "key": weights.prefix, "of": names, "left_out": left_out}
        output.print_json(data)
        return
    if left_out:
        output.say(f"left out, because they are not tensors: {some_of(left_out)}")
    under = f"all under {weights.prefix!r}" if weights.prefix else "all there are"
    output.print_written(out, f"{out}: {count_text(count, 'tensor')}, {under}, {size_text(size)}")
