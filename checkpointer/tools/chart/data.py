"""The data of a chart of a run: each checkpoint from save to end, the metric, the bytes on disk. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal

import attrs

from checkpointer._display import count_text
from checkpointer.policy.decide import explain
from checkpointer.policy.policy import Policy
from checkpointer.policy.ranking import Metric
from checkpointer.records.codec import to_plain_float
from checkpointer.records.manifest import Manifest
from checkpointer.records.record import Observation, Record
from checkpointer.tools.history import History
from checkpointer.tools.query import metric_names
from checkpointer.tools.simulate import Timeline

Fate = Literal["kept", "retired", "abandoned"]


@attrs.frozen(kw_only=True)
class ChartItem:
    """One checkpoint, as a picture shows it."""

    name: str
    step: int
    epoch: int
    size: int | None
    """Bytes; None if not known."""
    metrics: Mapping[str, float]
    fate: Fate
    end: int
    """Step at which it went, or the last one of all."""
    why: str
    """Why it was saved, or what keeps it."""
    kind: str = "regular"
    is_best: bool = False
    aliases: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; NaN and infinities as text."""
        metrics = {name: to_plain_float(value) for name, value in self.metrics.items()}
        return {**attrs.asdict(self, recurse=False), "metrics": metrics}


@attrs.frozen(kw_only=True)
class Chart:
    """The content of a chart."""

    title: str
    subtitle: str
    """The policy as text, or a summary."""
    metric: str
    """Name of the metric that is drawn; empty if there is none."""
    mode: str
    """``"min"``, ``"max"``, or empty if not known."""
    line: tuple[tuple[int, float], ...]
    """The metric at each step at which it was measured, finite values only."""
    items: tuple[ChartItem, ...]
    """Every checkpoint, in the order of their saves."""
    disk: tuple[tuple[int, int], ...]
    """Bytes on disk from each step on; empty if the size of a checkpoint is not known."""
    gone: int = 0
    """So many more checkpoints were retired, or were not copied: only the survivors are known."""
    risk: tuple[tuple[int, int], ...] = ()
    """Steps that a crash at each step would have lost; known only if it was simulated."""
    first_step: int = 0
    last_step: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; NaN and infinities as text."""
        # Not with recurse=True, which takes seconds for 200 000 checkpoints.
        return {**attrs.asdict(self, recurse=False), "items": [item.to_dict() for item in self.items]}


def chart_of_records(
    title: str,
    manifest: Manifest,
    *,
    policy: Policy | None = None,
    metric: Metric | None = None,
    aliases: Mapping[str, str] | None = None,
    history: History | None = None,
) -> Chart:
    """Return the chart of a directory's records: of the checkpoints that are still there.

    Args:
        title: What to call it.
        manifest: The records, as a run sees them.
        policy: Says what keeps each, and by which metric they are ranked.
        metric: Ranks instead of the policy's.
        aliases: Aliases, and the names they stand for.
        history: Everything that was measured, for the line.
    """
    if metric is None and policy is not None:
        metric = policy.ranking
    name = metric.name if metric else next(iter(metric_names(manifest.history)), "")
    line = _line(history.observations if history else manifest.history, name)
    steps = [*(step for step, _ in line), *(record.step for record in manifest.own)]
    last = max(steps, default=1)
    best = next(iter(metric.ranked(manifest.history)), None) if metric else None
    reasons = explain(policy, manifest) if policy else {}
    items = tuple(
        ChartItem(
            **_facts(record),
            fate="kept" if manifest.counts(record) else "abandoned",
            end=last,
            why="; ".join(reasons.get(record.name, ("no rule keeps it",))) if policy else record.reason,
            is_best=record is best,
            aliases=tuple(alias for alias, target in (aliases or {}).items() if target == record.name),
        )
        for record in manifest.own
    )
    gone = _gone(manifest)
    return Chart(
        title=title,
        subtitle=_subtitle(policy, len(items), gone),
        metric=name,
        mode=metric.mode if metric else "",
        line=line,
        items=items,
        disk=_grown(items),
        gone=gone,
        first_step=min(steps, default=0),
        last_step=last,
    )


def _subtitle(policy: Policy | None, there: int, gone: int) -> str:
    if not gone:
        return str(policy) if policy else count_text(there, "checkpoint")
    were, are = ("was", "is") if gone == 1 else ("were", "are")
    what = str(policy) if policy else f"{count_text(there, 'survivor')} of {there + gone} checkpoints"
    return f"{what}; {gone} more {were} retired, or {were} not copied, and {are} not known"


def chart_of_timeline(title: str, timeline: Timeline, history: History) -> Chart:
    r"""Return the chart of a simulation: of all that would have been saved, and what became of it.

    Example:
        >>> from checkpointer import EverySteps, KeepLast, Policy
        >>> from checkpointer.tools.history import read_history
        >>> from checkpointer.tools.simulate import simulate
        >>> history = read_history(b"step,loss\n10,0.5\n20,0.4\n", "metrics.csv")
        >>> timeline = simulate(Policy(EverySteps(10), [KeepLast(1)]), history)
        >>> [(item.step, item.fate, item.end) for item in chart_of_timeline("try", timeline, history).items]
        [(10, 'retired', 20), (20, 'kept', 20)]
    """
    policy, manifest, moments = timeline.policy, timeline.manifest, timeline.moments
    steps = [now.step for now in history.observations]
    name = policy.ranking.name if policy.ranking else next(iter(history.metrics), "")
    worst = timeline.most_lost
    risk = f"; at most {count_text(worst.lost_steps, 'step')} at risk" if worst else ""
    return Chart(
        title=title,
        subtitle=f"{policy}{risk}",
        metric=name,
        mode=policy.ranking.mode if policy.ranking else "",
        line=_line(history.observations, name),
        items=tuple(_simulated(timeline, explain(policy, manifest), policy.best_of(manifest.history))),
        disk=tuple((moment.observation.step, moment.bytes) for moment in moments) if timeline.has_sizes else (),
        risk=tuple((moment.observation.step, moment.lost_steps) for moment in moments),
        first_step=min(steps, default=0),
        last_step=max(steps, default=1),
    )


def _simulated(timeline: Timeline, reasons: Mapping[str, Sequence[str]], best: Record | None) -> Iterator[ChartItem]:
    policy = timeline.policy
    targets = {policy.name.last_file: timeline.manifest.newest, policy.name.best_file: best}
    for one in timeline.checkpoints:
        is_kept = one.retired_at is None
        yield ChartItem(
            **_facts(one.record),
            fate="kept" if is_kept else "retired",
            end=timeline.moments[-1].observation.step if one.retired_at is None else one.retired_at,
            why="; ".join(reasons.get(one.record.name, ())) if is_kept else one.record.reason,
            is_best=is_kept and one.record is best,
            aliases=tuple(alias for alias in policy.aliases if is_kept and targets[alias] is one.record),
        )


def _facts(record: Record) -> dict[str, Any]:
    fields = ("name", "step", "epoch", "kind", "metrics")
    return {field: getattr(record, field) for field in fields} | {"size": record.size or None}


def _gone(manifest: Manifest) -> int:
    """Return how many checkpoints of the run are not there any more.

    Serials count the saves of a directory. A missing one belongs to the run that has the next one.
    """
    gone, before = 0, 0
    for record in sorted(manifest.records, key=lambda record: record.serial):
        if (record.run, record.label) == (manifest.run, manifest.label):
            gone += max(record.serial - before - 1, 0)
        before = record.serial
    return gone


def _grown(items: Sequence[ChartItem]) -> tuple[tuple[int, int], ...]:
    """Return the bytes on disk after each save, if nothing was removed; empty if a size is not known."""
    sizes = [item.size for item in items if item.size is not None]
    if len(sizes) < len(items):
        return ()
    return tuple(sorted(zip((item.step for item in items), accumulate(sizes), strict=True)))


def _line(reports: Sequence[Record | Observation], name: str) -> tuple[tuple[int, float], ...]:
    values = ((report.step, report.metrics[name]) for report in reports if name in report.metrics)
    return tuple(sorted((step, value) for step, value in values if math.isfinite(value)))
