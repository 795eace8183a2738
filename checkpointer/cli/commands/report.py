"""``checkpointer report``: a page about a run."""

from __future__ import annotations

from typing import Annotated

import typer

from checkpointer.cli import options, output
from checkpointer.cli.commands.plot import Drawing, Source, chart_from
from checkpointer.tools.chart.html import report


def report_command(
    source: Source,
    out: Annotated[str, typer.Argument(metavar="OUT.html", help="The page; replaced if there.", show_default=False)],
    ranking: options.Ranking,
    drawing: Drawing,
    access: options.Access,
) -> None:
    """Make one HTML page of a run, which needs no network: as plot, with details, a table to sort, light and dark."""
    options.check_out(out, access, ".html", ".htm")
    report(chart_from(source, ranking, drawing, access), out)
    output.print_line(out)
