"""``checkpointer prune``: remove what a policy does not keep."""

from __future__ import annotations

from typing import Annotated

from checkpointer._display import count_text, size_text
from checkpointer.cli import options, output
from checkpointer.cli.choose_run import Chosen, choose, lacking, not_noted
from checkpointer.errors import PolicyError
from checkpointer.policy.policy import Policy
from checkpointer.policy.retention import KeepBest
from checkpointer.tools.prune import Pruning, plan_pruning, prune


def prune_command(
    directory: options.Directory,
    access: options.Access,
    policy: options.PolicyFile = None,
    apply: options.Apply = False,
    abandoned: Annotated[
        bool, options.option("--abandoned", "Also abandoned checkpoints, which do not count in the run any more.")
    ] = False,
    run: options.Run = None,
    as_json: options.Json = False,
) -> None:
    """Show which checkpoints of a run a policy would remove, and why; with --apply remove them.

    Without --policy it uses the policy that the run noted in the directory. It never removes checkpoints of other
    runs, files without a record, pinned checkpoints, and checkpoints that an alias points to.

    Example: checkpointer prune runs/digits --policy policy.yaml
    """
    chosen = choose(options.look(directory, access), run)
    by = _policy(chosen, policy)
    with options.changing(directory, access) as (catalog, journal):
        now = chosen.again(catalog)
        _check_metrics(by, now)
        pruning = plan_pruning(by, now.manifest, catalog.aliases, abandoned=abandoned)
        gone = prune(catalog, pruning, journal) if apply else ()
    names = [record.name for record in gone]
    if as_json:
        data = {"kept": dict(pruning.kept), "going": dict(pruning.going), "bytes": pruning.bytes, "removed": names}
        output.print_json(data)
    else:
        _print(pruning, len(names) if apply else None)
    output.leave_if(output.say_damaged(catalog) or (apply and len(names) < len(pruning.going)))


def _policy(chosen: Chosen, path: str | None) -> Policy:
    if path is not None:
        return options.read_policy(path)
    noted = chosen.policy
    if noted is None:
        raise not_noted(chosen, "; pass --policy FILE")
    output.say(f"by the policy that run {chosen.id} noted: {noted}")
    return noted


def _check_metrics(policy: Policy, chosen: Chosen) -> None:
    """Raise if a rule ranks by a metric that no checkpoint of the run has: it would keep none of them."""
    for rule in policy.rules if chosen.manifest.history else ():
        if isinstance(rule, KeepBest) and (problem := lacking(rule.metric, chosen)):
            msg = f"{rule} would keep none: {problem}"
            raise PolicyError(msg)


def _print(pruning: Pruning, removed: int | None) -> None:
    for name, why in pruning.kept.items():
        output.print_line(f"keep  {name}: {why}")
    for name, why in pruning.going.items():
        output.print_line(f"{'drop' if removed is None else 'gone'}  {name}: {why}")
    kept = len(pruning.kept)
    if removed is None or not pruning.records:
        output.print_line(output.would_remove(pruning.records, f", keep {kept}"))
    else:
        what = f"{count_text(len(pruning.records), 'checkpoint')} ({size_text(pruning.bytes)})"
        output.print_line(f"removed {removed} of {what}, kept {kept}")
