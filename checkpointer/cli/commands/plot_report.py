"""``checkpointer plot`` and ``report``: a picture of a run, and a page about it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import attrs

from checkpointer.cli import options, output
from checkpointer.cli.choose_run import choose, metric_of
from checkpointer.cli.commands.simulate import Size, as_bytes
from checkpointer.errors import PolicyError
from checkpointer.tools.chart.data import Chart, chart_of_records, chart_of_timeline
from checkpointer.tools.chart.html import report
from checkpointer.tools.chart.picture import FORMATS, plot
from checkpointer.tools.history import history_at
from checkpointer.tools.simulate import simulate

Source = Annotated[str, options.argument("SOURCE", "A directory, or a file of metrics (with --policy).")]


@attrs.frozen(kw_only=True)
class Drawing:
    """Options that say what a chart shows."""

    metrics: Annotated[
        str | None, options.option("--metrics FILE", "A file with all measured values, for the line of the metric.")
    ] = None
    size: Size = "0"
    run: options.Run = None


def plot_command(
    source: Source,
    out: Annotated[
        str,
        options.argument(
            "OUT",
            "The picture. Its extension sets the format: .png, .svg, .pdf, .jpg, .webp. An old file is replaced.",
        ),
    ],
    ranking: options.Ranking,
    drawing: Drawing,
    access: options.Access,
) -> None:
    """Draw a run: the metric, each checkpoint from its save to its removal, and the bytes on disk.

    If SOURCE is a directory, the picture shows its checkpoints. If SOURCE is a file of metrics, the picture shows what
    --policy would have saved.

    Example: checkpointer plot runs/digits digits.png
    """
    options.check_out(out, access, *(f".{name}" for name in FORMATS))
    plot(_chart(source, ranking, drawing, access), out)
    output.print_written(out, out)


def report_command(
    source: Source,
    out: Annotated[str, options.argument("OUT.html", "The page. An old file is replaced.")],
    ranking: options.Ranking,
    drawing: Drawing,
    access: options.Access,
) -> None:
    """Write one HTML page about a run: the picture of plot, details, and a table that you can sort.

    The page needs no network. It has a light and a dark mode.

    Example: checkpointer report runs/digits digits.html
    """
    options.check_out(out, access, ".html", ".htm")
    report(_chart(source, ranking, drawing, access), out)
    output.print_written(out, out)


def _chart(source: str, ranking: options.Ranking, drawing: Drawing, access: options.Access) -> Chart:
    policy = None if ranking.policy is None else options.read_policy(ranking.policy)
    options.check_source(source)
    if os.path.isfile(source):
        if policy is None:
            msg = f"{source} is a file of metrics: pass --policy FILE, to see what it would have saved"
            raise PolicyError(msg)
        history = history_at(source)
        timeline = simulate(policy, history, size=as_bytes(drawing.size))
        return chart_of_timeline(Path(source).name, timeline, history)
    catalog = options.look(source, access)
    chosen, metrics = choose(catalog, drawing.run), drawing.metrics
    metric = metric_of(ranking, chosen)
    if policy is None and metric is None:
        policy = chosen.policy
    output.say_damaged(catalog)
    return chart_of_records(
        catalog.place,
        chosen.manifest,
        policy=policy,
        metric=metric,
        aliases=catalog.aliases,
        history=None if metrics is None else history_at(metrics),
    )
