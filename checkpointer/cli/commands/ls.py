"""``checkpointer ls``: the checkpoints of a directory."""

from __future__ import annotations

import time
from typing import Annotated, Any

from checkpointer._display import age_text, count_text, number_text, size_text, some_of
from checkpointer._secrets import shown_place
from checkpointer.cli import options, output
from checkpointer.errors import CheckpointerError
from checkpointer.policy.decide import explain
from checkpointer.records.record import Record
from checkpointer.tools.catalog import Catalog, look_at
from checkpointer.tools.holders import holders
from checkpointer.tools.policies import Policies
from checkpointer.tools.query import NO_SCORE, Condition, check_metrics, metric_names, select

MOST_RUNS = 200
"""So many runs of a directory are looked into, unless more are asked for."""
_DIGITS = 4
"""Digits of a metric."""
_REASON = 40
"""Columns that a reason has if it needs them."""


Sort = Annotated[
    str | None,
    options.option(
        "--sort -s FIELD",
        "Sort by a field (step, size, time, ...) or a metric, smallest first. Without it: oldest first.",
        options.complete_field,
    ),
]
Where = Annotated[
    list[str] | None, options.option("--where -w CONDITION", "Only matching ones, such as 'val_loss<0.1'; repeatable.")
]
Metrics = Annotated[
    list[str] | None,
    options.option("--metric -m METRIC", "Show this metric; may be given again.", options.complete_metric),
]
Limit = Annotated[int | None, options.option("--limit -n N", "Show at most N. Without --sort: the newest N.", min=1)]


def ls_command(
    directory: options.Directory,
    access: options.Access,
    policy: options.PolicyFile = None,
    sort: Sort = None,
    reverse: Annotated[bool, options.option("--reverse -r", "Largest first.")] = False,
    where: Where = None,
    metric: Metrics = None,
    limit: Limit = None,
    names: Annotated[bool, options.option("--names -1", "Print only the names, one on each line.")] = False,
    run: options.Run = None,
    as_json: options.Json = False,
) -> None:
    """List checkpoints: name, step, epoch, metrics, size, age, aliases and why.

    "Why" names the rules that keep a checkpoint now. They are those of --policy, or of the policy that the run noted
    in the directory. Without a policy, "why" is the reason of the save. If a process may be training a run, the last
    line names it. If only directories below this one have checkpoints, ls lists those directories.

    Example: checkpointer ls runs/digits -n 5 --where 'val_loss<0.1'
    """
    catalog = options.look(directory, access, below=True)
    if not catalog.has_records:
        runs = [_run(directory, name, access) for name in catalog.below[: limit or MOST_RUNS]]
        _print_runs(catalog, runs, len(catalog.below), as_json=as_json)
        return
    chosen = options.policies(catalog, policy)
    records = catalog.of(run)
    is_reversed = reverse or (limit is not None and sort is None)
    found = select(records, map(Condition.parse, where or ()), sort=sort or "serial", reverse=is_reversed)[:limit]
    check_metrics(metric or (), records)
    if names:
        for record in found:
            output.print_line(record.name)
    elif as_json:
        reasons = why(catalog, chosen)
        output.print_json([as_data(catalog, record, reasons[record.name]) for record in found])
    else:
        _print(catalog, found, chosen, metric or _metrics(found, chosen))
    if catalog.below:
        output.say(f"below are directories with records of their own: {some_of(catalog.below)}")
    output.leave_if(output.say_damaged(catalog))


def _run(directory: str, name: str, access: options.Access) -> dict[str, Any]:
    """Return what JSON shows of a directory below; step and time (Unix seconds) are those of its newest checkpoint."""
    path, error = f"{directory.rstrip('/')}/{name}", ""
    records: tuple[Record, ...] = ()
    try:
        catalog = look_at(options.open_place(path, access), access.key)
        records, error = catalog.records, options.unchecked_text(catalog)
    except (CheckpointerError, OSError) as refusal:
        error = str(refusal)
    step, when = (records[-1].step, records[-1].time) if records else (None, None)
    size = sum(record.size for record in records)
    run = {"directory": name, "path": shown_place(path), "checkpoints": len(records), "step": step, "bytes": size}
    return run | {"time": when, "error": error}


def _print_runs(catalog: Catalog, runs: list[dict[str, Any]], count: int, *, as_json: bool) -> None:
    if as_json:
        output.print_json(runs)
    else:
        output.print_line(f"{catalog.place}: no checkpoint of its own; directories below: {count}")
        now, columns = time.time(), ("checkpoints", "step", "size", "age")
        rows: list[list[output.Cell]] = []
        for run in runs:
            step, age = (str(run["step"]), age_text(now - run["time"])) if run["checkpoints"] else ("", "")
            name = [(run["directory"], "bold"), *([(run["error"], "red")] if run["error"] else [])]
            rows.append([str(run["checkpoints"]), step, size_text(run["bytes"]), age, name])
        output.print_table([*columns, "name"], rows, right=columns)
    if len(runs) < count:
        output.say(f"{count - len(runs)} more not shown; --limit N shows more")


def why(catalog: Catalog, policies: Policies) -> dict[str, str]:
    """Return why each checkpoint is there: what keeps it now under a policy, else what it was saved for."""
    reasons: dict[str, str] = {}
    for run, label in catalog.runs:
        manifest, policy = catalog.manifest(run, label), policies.of(run, label)
        kept = {} if policy is None else explain(policy, manifest)
        for record in manifest.own:
            if abandoned := manifest.why_abandoned(record):
                reasons[record.name] = abandoned
            elif policy is None:
                when = "" if record.is_adopted else "when it was saved: "
                reasons[record.name] = f"{'pinned; ' if record.pinned else ''}{when}{record.reason}"
            else:
                reasons[record.name] = "; ".join(kept.get(record.name, ("no rule keeps it",)))
    return reasons


def _best(catalog: Catalog, policies: Policies) -> frozenset[str]:
    """Return the name of the best checkpoint of each run, as far as the policy says which it is."""
    ranked = ((policies.of(run, label), catalog.manifest(run, label)) for run, label in catalog.runs)
    best = (policy.best_of(manifest.history) for policy, manifest in ranked if policy is not None)
    return frozenset(record.name for record in best if record is not None)


def as_data(catalog: Catalog, record: Record, reason: str) -> dict[str, Any]:
    """Return a record as JSON shows it."""
    more = {"path": catalog.location(record.name), "aliases": catalog.aliases_of(record), "why": reason}
    return record.to_dict() | more | ({} if record.is_epoch_known else {"epoch": None})


def _metrics(records: list[Record], policies: Policies) -> list[str]:
    """Return the metrics there are: first what the policies rank by, last times, rates and the like."""
    ranked = policies.metrics((record.run, record.label) for record in records)
    return sorted(metric_names(records), key=lambda name: 0 if name in ranked else 2 if NO_SCORE.fullmatch(name) else 1)


def _print(catalog: Catalog, records: list[Record], policies: Policies, metrics: list[str]) -> None:
    some = "" if len(records) == len(catalog.records) else f"{len(records)} of "
    total = size_text(sum(record.size for record in records))
    output.print_line(f"{catalog.place}: {some}{count_text(len(catalog.records), 'checkpoint')}, {total}")
    reasons, best = why(catalog, policies), _best(catalog, policies) if output.is_coloured() else frozenset()
    widest = max((max(len(r.name), min(_REASON, len(reasons[r.name]))) for r in records), default=0)
    columns = _columns(catalog, records, metrics, room=output.width() - widest)
    names = [
        [
            (record.name, "green" if record.name in best else "bold" if record.kind == "regular" else "red"),
            *((f"<- {alias}", "green") for alias in catalog.aliases_of(record)),
            (reasons[record.name], "dim"),
        ]
        for record in records
    ]
    output.print_table([*columns, "name"], zip(*columns.values(), names, strict=True), right=[*columns])
    for one in holders(catalog):
        label = f" ({one.label})" if one.label else ""
        output.print_line(f"run {one.run}{label} is held by {one.claim}, term {one.term}")


def _columns(catalog: Catalog, records: list[Record], metrics: list[str], *, room: int) -> dict[str, list[str]]:
    """Return the columns before the names; the last metrics are left out if they do not fit into the room."""
    now = time.time()
    columns = {
        "step": [str(record.step) for record in records],
        "epoch": [str(record.epoch) if record.is_epoch_known else "" for record in records],
        **{
            name: [number_text(r.metrics[name], _DIGITS) if name in r.metrics else "" for r in records]
            for name in metrics
        },
        **({"run": [record.run for record in records]} if len(catalog.runs) > 1 else {}),
        "size": [size_text(record.size) for record in records],
        "age": [age_text(now - record.time) for record in records],
    }
    for name in reversed(metrics[1:]):
        if sum(max(map(len, (head, *cells))) + 2 for head, cells in columns.items()) > room:
            del columns[name]
    return columns
