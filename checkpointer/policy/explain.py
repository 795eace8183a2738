"""The checkpoints of a run as a table for a notebook."""

from __future__ import annotations

from checkpointer._display import number_text, size_text, table_html
from checkpointer.policy.decide import explain
from checkpointer.policy.policy import Policy
from checkpointer.records.manifest import Manifest

__all__ = ["manifest_html"]


def manifest_html(policy: Policy, manifest: Manifest, where: str) -> str:
    """Return the run's checkpoints, oldest first: name, step, metrics, size, and why each is kept."""
    why = explain(policy, manifest)
    rows = []
    for record in manifest.live:
        metrics = "\n".join(f"{name}={number_text(value)}" for name, value in record.metrics.items())
        reasons = "\n".join(why.get(record.name, ()))
        rows.append([record.name, str(record.step), metrics, size_text(record.size), reasons])
    return table_html(["name", "step", "metrics", "size", "why"], rows, f"{where}: {policy}")
