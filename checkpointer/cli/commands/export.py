"""``checkpointer export``: the weights of a checkpoint as a file of their own."""

from __future__ import annotations

import enum
from typing import Annotated

import typer

from checkpointer._display import count_text, size_text, some_of
from checkpointer.cli import options, output
from checkpointer.errors import RestoreError
from checkpointer.formats.export import WeightsFormat, format_by_name, write_weights
from checkpointer.formats.inspection.payload import open_contents
from checkpointer.formats.inspection.tensors import Tensors
from checkpointer.formats.inspection.weights import Weights, weights_of
from checkpointer.restore.load import verify


class Format(str, enum.Enum):
    """The formats that can be written."""

    SAFETENSORS = "safetensors"
    TORCH = "torch"


Only = Annotated[
    str | None,
    typer.Option(
        "--only",
        metavar="KEY",
        help="Where the weights are: a key such as model or state_dict.encoder, or a file; '' for all tensors.",
    ),
]
AsFormat = Annotated[
    Format | None,
    typer.Option("--format", help="Else OUT's extension decides: .safetensors; .pt, .pth, .ckpt, .bin for torch."),
]


def export_command(
    directory: options.Directory,
    name: Annotated[str, typer.Argument(help="A name, step or alias.", show_default=False)],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The new file.", show_default=False)],
    access: options.Access,
    format: AsFormat = None,
    only: Only = None,
    as_json: options.Json = False,
) -> None:
    """Write a checkpoint's weights as safetensors or a flat torch file, tensor by tensor. It is verified first."""
    options.check_out(out, access)
    catalog = options.look(directory, access)
    record = catalog.find(name)
    written_as = format_of(out, format)
    verify(catalog.storage, record)
    with open_contents(catalog.storage, record.name) as contents:
        write(weights_in(contents, only, record.name), out, written_as, [record.name], as_json=as_json)
    # The checkpoint that an alias was meant for may be among these.
    output.say_damaged(catalog)


def format_of(out: str, format: Format | None) -> WeightsFormat:
    """Return what is written to OUT; asked before anything is read."""
    return format_by_name(out) if format is None else format.value


def weights_in(contents: Tensors, only: str | None, name: str) -> Weights:
    """Return the weights of a checkpoint; an error names it."""
    try:
        return weights_of(contents, only)
    except RestoreError as error:
        msg = f"{name}: {error}"
        raise type(error)(msg) from error


def write(weights: Weights, out: str, format: WeightsFormat, names: list[str], *, as_json: bool) -> None:
    """Write weights, and say what was written."""
    total = sum(info.bytes for info in weights.tensors.values())
    with output.progress("writing", total) as advance:

        def read(name: str) -> object:
            advance(weights.tensors[name].bytes)
            return weights.read(name)

        size = write_weights(out, weights.tensors, read, format=format)
    left_out = [*weights.values]
    if as_json:
        data = {"path": out, "bytes": size, "tensors": len(weights.tensors), "key": weights.prefix, "of": names}
        output.print_json(data | {"left_out": left_out})
        return
    if left_out:
        output.say(f"left out, because they are not tensors: {some_of(left_out)}")
    under = f"all under {weights.prefix!r}" if weights.prefix else "all there are"
    output.print_line(f"{out}: {count_text(len(weights.tensors), 'tensor')}, {under}, {size_text(size)}")
