"""Refuses arguments of the Trainer, and parts of a policy, that contradict the callback, and names the change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from checkpointer import Policy
from checkpointer.errors import PolicyError
from checkpointer_transformers.trainer_state import evaluated


def refuse(args: Any, policy: Policy) -> None:
    """Raise `PolicyError` with everything that has to be changed, if anything has."""
    changes = [*_conflicts(args), *_contradicts(args, policy), *_ranks_otherwise(args, policy)]
    if changes:
        msg = "this Trainer and its CheckpointCallback contradict each other; " + "; ".join(changes)
        raise PolicyError(msg)


def _conflicts(args: Any) -> Iterator[str]:
    strategy = _plain(args.save_strategy)
    if strategy != "no":
        yield f"save_strategy={strategy!r}: set save_strategy='no', the policy decides when"
    if args.save_total_limit is not None:
        yield f"save_total_limit={args.save_total_limit!r}: leave it out, the policy decides what to keep"
    if getattr(args, "enable_jit_checkpoint", False):
        yield "enable_jit_checkpoint=True: leave it out, attach(trainer) saves on SIGTERM on all ranks together"
    if args.save_on_each_node:
        yield "save_on_each_node=True: leave it out and let the nodes share output_dir, rank 0 must see all files"
    hub = _plain(args.hub_strategy)
    if args.push_to_hub and hub in ("checkpoint", "all_checkpoints"):
        yield f"hub_strategy={hub!r} uploads a checkpoint that may be retired meanwhile: use 'every_save' or 'end'"


def _contradicts(args: Any, policy: Policy) -> Iterator[str]:
    if args.save_only_model and policy.contents == "full":
        yield "save_only_model=True: leave it out, or say Policy(..., contents='weights')"
    if not args.save_only_model and policy.contents == "weights":
        yield "Policy(contents='weights'): set save_only_model=True, because the Trainer writes"
    for alias in policy.aliases:
        if alias.startswith("checkpoint-"):
            yield f"the alias {alias!r} looks like a checkpoint to the Trainer: name it otherwise, Naming(last=...)"


def _ranks_otherwise(args: Any, policy: Policy) -> Iterator[str]:
    ranking = policy.ranking
    if args.load_best_model_at_end and ranking is None:
        yield "load_best_model_at_end=True, but no rule ranks: add KeepBest(1, metric, mode=...) to the policy's keep"
    name = args.metric_for_best_model
    if ranking is None or name is None:
        return
    name = evaluated(name)
    mode = "max" if args.greater_is_better else "min"
    if (name, mode) != (ranking.name, ranking.mode):
        yield (
            f"metric_for_best_model={args.metric_for_best_model!r} means {name} ({mode}), and the policy ranks by "
            f"{ranking.name} ({ranking.mode}): name one metric and one direction in both"
        )


def _plain(strategy: Any) -> str:
    return str(getattr(strategy, "value", strategy))
