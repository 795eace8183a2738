"""``checkpointer simulate``: a policy played over the metrics of a training."""

from __future__ import annotations

import os
import sys
from itertools import compress
from typing import Annotated, Any

from checkpointer._display import age_text, count_text, number_text, size_text
from checkpointer.cli import options, output
from checkpointer.cli.choose_run import choose
from checkpointer.errors import ObservationError
from checkpointer.policy.decide import Attach, Save, Skip
from checkpointer.tools.history import MAX_BYTES, History, history_at, history_of, read_history
from checkpointer.tools.simulate import Moment, Timeline, simulate

Source = Annotated[str, options.argument("METRICS", "CSV or JSON lines, - for stdin, or the directory of an old run.")]
Size = Annotated[str, options.option("--size BYTES", "Size of a checkpoint, such as 2.4GB, if it is not known.")]
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def simulate_command(
    metrics: Source,
    policy: options.RequiredPolicyFile,
    access: options.Access,
    size: Size = "0",
    everything: Annotated[bool, options.option("--all", "Print every observation, even if nothing was due.")] = False,
    run: options.Run = None,
    as_json: options.Json = False,
) -> None:
    """Apply a policy to the metrics of a training, and print what it would save, keep and remove.

    It decides with the function that a manager uses. "at risk" is the number of steps that a crash just before the
    checkpoint of that step would lose.

    Example: checkpointer simulate metrics.csv --policy policy.yaml --size 2.4GB
    """
    history = _read_source(metrics, run, access)
    timeline = simulate(options.read_policy(policy), history, size=as_bytes(size))
    if as_json:
        output.print_json(_as_data(timeline, has_all=not history.has_survivors_only))
    else:
        _print(timeline, everything=everything, has_all=not history.has_survivors_only)


def _read_source(source: str, run: str | None, access: options.Access) -> History:
    if source == "-":
        return read_history(sys.stdin.buffer.read(MAX_BYTES + 1), "stdin")
    options.check_source(source)
    if os.path.isfile(source):
        return history_at(source)
    return history_of(choose(options.look(source, access), run).manifest.own)


def as_bytes(text: str) -> int:
    """Return a size in bytes, such as ``2.4GB``."""
    number = text.strip().rstrip("kKmMgGtTbB ")
    unit = text.strip()[len(number) :].strip().lower()
    try:
        return max(0, round(float(number) * _UNITS[unit]))
    except (KeyError, ValueError, OverflowError):
        msg = f"{text!r} is not a size; write a number of bytes, 350MB or 2.4GB"
        raise ObservationError(msg) from None


def _as_data(timeline: Timeline, *, has_all: bool) -> dict[str, Any]:
    """Return what JSON shows; what is not known is null. ``has_all``: every report of the training is known."""
    worst, has_sizes = timeline.most_lost if has_all else None, timeline.has_sizes
    return {
        "policy": str(timeline.policy),
        "moments": [
            {
                "step": moment.observation.step,
                "epoch": moment.observation.epoch,
                "metrics": dict(moment.observation.metrics),
                "decision": type(moment.decision).__name__.lower(),
                "name": None if isinstance(moment.decision, Skip) else moment.decision.name,
                "reason": moment.decision.reason,
                "retired": moment.retired,
                "kept": moment.num_kept,
                "bytes": moment.bytes if has_sizes else None,
                "peak_bytes": moment.peak_bytes if has_sizes else None,
                "lost_steps": moment.lost_steps if has_all else None,
                "lost_s": moment.lost_s if has_all else None,
            }
            for moment in timeline.moments
        ],
        "kept": [record.to_dict() for record in timeline.manifest.records],
        "saved": len(timeline.checkpoints),
        "peak_bytes": timeline.peak_bytes if has_sizes else None,
        "most_lost": None if worst is None else {"step": worst.observation.step, "lost_steps": worst.lost_steps},
    }


def _print(timeline: Timeline, *, everything: bool, has_all: bool) -> None:
    output.print_table([""], [[str(timeline.policy)]])
    shown = [m for m in timeline.moments if everything or not isinstance(m.decision, Skip) or m.decision.due]
    ranked = timeline.policy.ranking.name if timeline.policy.ranking else ""
    known = [True, bool(ranked), True, timeline.has_sizes, has_all]
    columns = [*compress(("step", ranked, "kept", "on disk", "at risk"), known)]
    rows: list[list[output.Cell]] = []
    for moment in shown:
        value = moment.observation.metrics.get(ranked)
        cells = (str(moment.observation.step), number_text(value) if value is not None else "", str(moment.num_kept))
        numbers = (*cells, size_text(moment.bytes), f"{moment.lost_steps}")
        rows.append([*compress(numbers, known), [(line, "") for line in _what(moment)]])
    output.print_table([*columns, "what"], rows, right=columns)
    for line in _summary(timeline, has_all=has_all):
        output.print_line(line)


def _what(moment: Moment) -> list[str]:
    """Return what happened, a line for each checkpoint that was saved or retired."""
    decision = moment.decision
    if isinstance(decision, Save):
        first = f"+ {decision.name}"
    elif isinstance(decision, Attach):
        first = f"ranked {decision.name}"
    else:
        first = decision.reason if decision.due else ""
    return [first, *(f"- {name}" for name in moment.retired)]


def _summary(timeline: Timeline, *, has_all: bool) -> list[str]:
    observations, saves = count_text(len(timeline.moments), "observation"), len(timeline.checkpoints)
    retired = sum(one.retired_at is not None for one in timeline.checkpoints)
    peak = f"at most {size_text(timeline.peak_bytes)} on disk"
    on_disk = peak if timeline.has_sizes else "the size on disk is not known; --size 2GB gives that of a checkpoint"
    lines = [f"{observations}: {saves} saved, {retired} retired, {saves - retired} kept; {on_disk}"]
    worst = timeline.most_lost
    if not has_all:
        known = count_text(len(timeline.moments), "survivor")
        lines.append(
            f"only the {known} of the run {'is' if len(timeline.moments) == 1 else 'are'} known, not what it reported "
            "between them, so the steps at risk are not known; pass a file of all its metrics to see them"
        )
    elif worst is not None:
        seconds = f" ({age_text(worst.lost_s)})" if worst.lost_s else ""
        lost = f"{count_text(worst.lost_steps, 'step')}{seconds}"
        lines.append(f"worst case: a crash at step {worst.observation.step} loses {lost}")
    best = timeline.policy.best_of(timeline.manifest.history)
    if best is not None and timeline.policy.ranking is not None:
        lines.append(f"best: {best.name}, {timeline.policy.ranking}")
    return lines
