"""The message about checkpoints that lost payload or record, and about what becomes the newest and the best."""

from __future__ import annotations

from collections.abc import Sequence

from checkpointer._display import some_of
from checkpointer.policy.policy import Policy
from checkpointer.records.manifest import Manifest
from checkpointer.records.record import Record


def few_names(records: Sequence[Record]) -> str:
    """Return the names of the first three records, and how many more there are."""
    return some_of([record.name for record in records], 3)


def missing_text(
    policy: Policy, before: Manifest, now: Manifest, missing: Sequence[Record], unrecorded: Sequence[Record] = ()
) -> str:
    """Return the message about checkpoints that do not count any more.

    The payload of the ``missing`` ones is gone or has another size; the record of the ``unrecorded`` ones was deleted.
    """
    texts = []
    if missing:
        are, have, their, do = _agreeing(missing)
        texts += [f"{few_names(missing)} {are} gone, or {have} another size than {their}, and {do} not count"]
    if unrecorded:
        _, have, _, do = _agreeing(unrecorded)
        texts += [f"{few_names(unrecorded)} {have} a payload but no record any more, and {do} not count"]
    tokens = {record.token for record in (*missing, *unrecorded)}
    pairs = {
        "newest": (before.newest, now.newest),
        "best": (policy.best_of(before.history), policy.best_of(now.history)),
    }
    for what, (was, is_now) in pairs.items():
        if was is not None and was.token in tokens:
            texts += [f"the {what} is {is_now.name} now, not {was.name}" if is_now else f"there is no {what} one now"]
    return "; ".join(texts)


def _agreeing(records: Sequence[Record]) -> tuple[str, str, str, str]:
    """Return the parts of a sentence that agree with the number of records."""
    return ("is", "has", "its record says", "does") if len(records) == 1 else ("are", "have", "their records say", "do")
