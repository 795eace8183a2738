"""``checkpointer plot``: a picture of a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from checkpointer.cli import options, output
from checkpointer.cli.commands.best import By, WhichMode
from checkpointer.cli.commands.simulate import Size, as_bytes
from checkpointer.errors import PolicyError
from checkpointer.policy.ranking import Metric
from checkpointer.policy.yaml_codec import suggest
from checkpointer.tools.chart.data import Chart, chart_of_records, chart_of_timeline
from checkpointer.tools.chart.png import plot
from checkpointer.tools.history import read_history
from checkpointer.tools.query import metric_names
from checkpointer.tools.simulate import simulate

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE", help="A directory; or a file of metrics, to play --policy over.", show_default=False
    ),
]
Metrics = Annotated[
    str | None, typer.Option("--metrics", metavar="FILE", help="All that was measured, for the line of the metric.")
]


def plot_command(
    source: Source,
    out: Annotated[str, typer.Argument(metavar="OUT.png", help="The picture; replaced if there.", show_default=False)],
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
    """Draw a run: the metric and what was kept of it, each checkpoint from save to end, bytes on disk.

    Of a directory it shows what is there; of a file of metrics, what --policy would have made of it.
    """
    options.check_out(out, key_env, key_file)
    chart = chart_from(source, policy, by, mode, metrics, size, run, storage_options, (key_env, key_file))
    options.check_extension(out, ".png")
    plot(chart, out)
    output.print_line(out)


def chart_from(
    source: str,
    policy: str | None,
    by: str | None,
    mode: options.Mode | None,
    metrics: str | None,
    size: str,
    run: str | None,
    storage_options: str | None,
    keys: tuple[str | None, str | None],
) -> Chart:
    """Return what is to be shown."""
    chosen = None if policy is None else options.read_policy(policy)
    if os.path.isfile(source):
        if chosen is None:
            msg = f"{source} is a file of metrics: pass --policy FILE, to see what it would have made of them"
            raise PolicyError(msg)
        history = read_history(Path(source).read_bytes(), source)
        return chart_of_timeline(Path(source).name, simulate(chosen, history, size=as_bytes(size)), history)
    if (by is None) != (mode is None):
        msg = "--by and --mode belong together: --by val_loss --mode min"
        raise PolicyError(msg)
    catalog = options.look(source, storage_options, *keys)
    manifest = catalog.manifest(run)
    names = dict.fromkeys(metric_names(manifest.own))
    if by is not None and by not in names:
        msg = f"no checkpoint of the run has the metric {by!r}{suggest(by, names)}"
        raise PolicyError(msg)
    output.say_damaged(catalog)
    return chart_of_records(
        catalog.place,
        manifest,
        policy=chosen,
        metric=Metric(by, mode=mode.value) if by and mode else None,
        aliases=catalog.aliases,
        history=None if metrics is None else read_history(Path(metrics).read_bytes(), metrics),
    )
