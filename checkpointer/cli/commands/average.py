"""``checkpointer average``: the mean of the weights of several checkpoints."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from checkpointer._display import count_text
from checkpointer.cli import options, output
from checkpointer.cli.commands.best import best_first
from checkpointer.cli.commands.export import AsFormat, Only, format_of, weights_in, write
from checkpointer.errors import PolicyError
from checkpointer.formats.export import WeightsFormat
from checkpointer.formats.inspection.payload import open_contents
from checkpointer.records.record import Record
from checkpointer.restore.load import verify
from checkpointer.tools.average import average
from checkpointer.tools.catalog import Catalog


def average_command(
    directory: options.Directory,
    access: options.Access,
    ranking: options.Ranking,
    names: Annotated[
        list[str] | None, typer.Argument(help="Names, steps or aliases; or else --best.", show_default=False)
    ] = None,
    out: Annotated[str, typer.Option("--out", "-o", metavar="OUT", help="The new file.", show_default=False)] = "",
    best: Annotated[int | None, typer.Option("--best", metavar="K", min=1, help="The best K.")] = None,
    format: AsFormat = None,
    only: Only = None,
    run: options.Run = None,
    as_json: options.Json = False,
) -> None:
    """Average the weights of the named checkpoints, or of the best K by a metric. Each is verified first.

    The mean is computed tensor by tensor in double precision; counters are those of the first checkpoint.
    """
    if not out:
        msg = "--out is missing; name the new file, such as --out averaged.safetensors"
        raise PolicyError(msg)
    if bool(names) == (best is not None):
        msg = "name the checkpoints, or pass --best K with --by METRIC --mode min or max, or a --policy"
        raise PolicyError(msg)
    options.check_out(out, access)
    catalog = options.look(directory, access)
    written_as = format_of(out, format)
    records = [catalog.find(name) for name in names or ()]
    if best is not None:
        records = best_first(catalog, catalog.manifest(run), ranking)[:best]
        if len(records) < best:
            output.say(f"the run has {count_text(len(records), 'ranked checkpoint')}; their mean is taken")
    _average(catalog, records, out, written_as, only, as_json=as_json)


def _average(
    catalog: Catalog, records: list[Record], out: str, format: WeightsFormat, only: Only, *, as_json: bool
) -> None:
    with contextlib.ExitStack() as stack:
        sources = []
        for record in records:
            verify(catalog.storage, record)
            contents = stack.enter_context(open_contents(catalog.storage, record.name))
            sources.append((record.name, weights_in(contents, only, record.name)))
        write(average(sources), out, format, [record.name for record in records], as_json=as_json)
    if not as_json:
        for record in records:
            output.print_line(f"  {record.name}")
