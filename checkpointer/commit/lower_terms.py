"""The last step of a takeover: what counts becomes independent of writers that may be alive and go on."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from checkpointer.commit.changes import Changes
from checkpointer.commit.contents import Contents
from checkpointer.commit.payload_names import Names
from checkpointer.commit.terms import Term


def take_over(contents: Contents, names: Names, announced: Iterable[Changes], term: Term) -> None:
    """Limit what counts of lower terms (step 6 of `checkpointer.commit.terms`).

    If the record or payload of a checkpoint may still change, it gets another name.
    """
    run, poisoned = (term.run, term.label), contents.aliases.poisoned
    replacing = {entry.record.name: entry.record for one in announced for entry in one.entries}
    manifest = contents.manifest
    before = [r for r in manifest.records if (r.run, r.label) == run and manifest.is_of_holder(r)]
    for record in [r for r in before if r.name in poisoned]:
        by = [replacing[record.name]] if record.name in replacing else []
        moved = names.move_slot(record, maybe=[record, *by])
        if moved is None and by:
            moved = names.move_slot(by[0], maybe=by)  # It was replaced since it was read.
        if moved is None and record.name in contents.manifest.by_name:
            contents.manifest = contents.manifest.without(record.name)
    manifest = contents.manifest
    before = [r for r in manifest.everywhere.records if (r.run, r.label) == run and r.term < term.number]
    own = (r for r in before if not r.is_adopted and r.name not in poisoned and manifest.is_of_holder(r))
    limits = (*manifest.limits.get(run, ()), (term.number, max((r.serial for r in own), default=0)))
    term.limit(limits, (entry.record.name for one in announced for entry in one.entries))
    contents.manifest = attrs.evolve(manifest, limits={**manifest.limits, run: limits})
