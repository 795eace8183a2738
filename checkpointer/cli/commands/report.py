"""``checkpointer report``: a page about a run."""

from __future__ import annotations

from typing import Annotated

import typer

from checkpointer.cli import options, output
from checkpointer.cli.commands.best import By, WhichMode
from checkpointer.cli.commands.plot import Metrics, Source, chart_from
from checkpointer.cli.commands.simulate import Size
from checkpointer.tools.chart.html import report


def report_command(
    source: Source,
    out: Annotated[str, typer.Argument(metavar="OUT.html", help="The page; replaced if there.", show_default=False)],
    policy: options.PolicyFile = None,
    by: By = None,
    mode: WhichMode = None,
    metrics: Metrics = None,
    size: Size = "0",
    run: options.Run = None,
    storage_options: options.StorageOptions = None,
    key_env: options.KeyEnv = None,
    key_file: options.KeyFile = None,
) -> None:
    """Make one HTML page of a run, which needs no network: as plot, with details, a table to sort, light and dark."""
    options.check_out(out, key_env, key_file)
    chart = chart_from(source, policy, by, mode, metrics, size, run, storage_options, (key_env, key_file))
    options.check_extension(out, ".html", ".htm")
    report(chart, out)
    output.print_line(out)
