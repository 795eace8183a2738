"""Which run and line a process goes on with, before its first save and after it went back to a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import attrs

from checkpointer._display import some_of
from checkpointer.commit.contents import Contents
from checkpointer.commit.deleted_by_others import missing_text
from checkpointer.commit.payload_names import Names
from checkpointer.errors import NotFoundError
from checkpointer.records.manifest import Manifest
from checkpointer.records.record import Line, Record, commit_order

_log = logging.getLogger("checkpointer")


@attrs.frozen
class Lines:
    """Shows the records as a run sees them, and goes on from one of them. Writes nothing."""

    _contents: Contents
    _names: Names

    @property
    def view(self) -> Manifest:
        """The manifest; before this run has saved or restored, as the newest run under the label sees it."""
        manifest = self._contents.manifest  # Once, because with background= the writer thread replaces it.
        return manifest if self._contents.is_claimed or manifest.own else self._as_next_process(manifest)

    def _as_next_process(self, manifest: Manifest) -> Manifest:
        """Return the manifest as the next process sees it if it goes on with the newest run under the label."""
        # If no payload exists, the newest run is the one whose payloads are gone: a restore reports them.
        for records in (manifest.records, manifest.aside):
            labelled = [r for r in records if r.label == manifest.label and manifest.is_of_holder(r)]
            if labelled:
                return manifest.on_newest_line(labelled[-1].run)
        return manifest

    def say_chosen(self, record: Record) -> None:
        """If the run of a checkpoint was chosen by its age alone, log which other runs there are."""
        contents = self._contents
        manifest = contents.manifest
        others = {
            other.run: other
            for other in manifest.records
            if (other.label, other.is_adopted) == (record.label, record.is_adopted) and manifest.is_of_holder(other)
        }
        if others.pop(record.run, None) is None or not others or contents.is_claimed:
            return
        text = ", ".join(f"{run} (newest {other.name}, step {other.step})" for run, other in [*others.items()][-4:])
        msg = (
            f"{contents.storage} has checkpoints of {len(others) + 1} runs; taken is {record.name} of the newest run, "
            f"{record.run}. To take another run pass run=, or name a checkpoint. The other runs: {text}"
        )
        contents.warn_once("runs", msg, _log.warning)

    def check_step(self, which: str | int | None, run: str) -> None:
        """Raise `NotFoundError` if this is a step that several runs have, and ``run`` was chosen by its age alone."""
        contents = self._contents
        manifest = contents.manifest
        if not isinstance(which, int) or contents.is_claimed or manifest.own:
            return
        same = [record for record in manifest.records if (record.step, record.label) == (which, manifest.label)]
        found = [record for record in same if manifest.on_newest_line(record.run).counts(record)]
        if any(record.run == run for record in found) and any(record.run != run for record in found):
            names = some_of([f"{record.name} (run {record.run})" for record in found])
            where = f"{contents.storage} has {len(found)} checkpoints of step {which}"
            msg = f"{where}: {names}; name one of them, or pass run="
            raise NotFoundError(msg)

    @property
    def missing_text(self) -> str:
        """A message about payloads that were gone at the start; empty if there are none."""
        view = self.view
        return missing_text(self._contents.policy, view.everywhere, view, view.aside) if view.aside else ""

    def widened(self, elsewhere: Iterable[Record]) -> Manifest:
        """Return the view with the records that do not count here: those on the mirror, and those set aside.

        A record that only the mirror has gets the name that it would get here.
        """
        contents = self._contents
        here = {record.token for record in (*contents.manifest.records, *contents.manifest.aside)}
        taken = set(contents.manifest.taken.union(contents.policy.aliases))
        found = []
        for record in elsewhere:
            if record.token not in here:
                name = record.name if record.name not in taken else self._names.own(record, taken)
                taken.add(name)
                # The terms of another directory are other numbers.
                found.append(attrs.evolve(record, name=name, term=contents.manifest.highest_term))
        contents.manifest = attrs.evolve(contents.manifest, elsewhere=tuple(found))
        view, wide = self.view.everywhere, contents.manifest.everywhere
        if contents.is_on_line:
            return wide
        # Before this process has saved or restored, the run goes on from its newest record, here or on the mirror.
        labelled = [record for record in wide.records if record.label == wide.label and wide.is_of_holder(record)]
        if not contents.is_claimed and not view.own and labelled:
            view = view.seen_by(labelled[-1].run, labelled[-1].line)
        return view.seen_by(view.run, view.newest_line) if view.own else view

    def resume(self, record: Record, *, protect: bool) -> None:
        """Go on from this record; ``protect`` keeps it even if no rule does."""
        contents = self._contents
        if record.name not in contents.manifest.by_name:
            contents.manifest = contents.manifest.with_record(record)  # Its payload has come back.
        self._log_restart(record.step, lambda newest: commit_order(newest) > commit_order(record))
        manifest = contents.manifest.resumed_at(record)
        self._turn_to(attrs.evolve(manifest, resumed=record.name if protect else ""))

    def resume_run(self, run: str, line: Line, step: int, source: str = "") -> None:
        """Go on with a run whose host was at ``step`` of this line; the checkpoint named ``source`` is kept."""
        self._log_restart(step, lambda newest: newest.step > step)
        self._turn_to(attrs.evolve(self._contents.manifest.resumed_from(run, line, step), resumed=source))

    def _log_restart(self, step: int, is_beyond: Callable[[Record], bool]) -> None:
        """Warn that before the next save only this process knows that the run went back."""
        newest = self._as_next_process(self._contents.manifest).newest
        if self._contents.is_prepared and newest is not None and is_beyond(newest):
            text = "going on from step %d: until the next save, a restart goes on from %s (step %d) again"
            _log.warning(text, step, newest.name, newest.step)

    def see(self, run: str, line: Line) -> None:
        """Show the records as this run and line see them from now on."""
        if (run, line) != (self._contents.manifest.run, self._contents.manifest.line):
            self._turn_to(self._contents.manifest.seen_by(run, line))

    def _turn_to(self, manifest: Manifest) -> None:
        contents = self._contents
        contents.is_claimed = contents.is_on_line = True
        contents.manifest = manifest
        # The run changed, so alias ownership is resolved again before the next write.
        contents.is_begun = False
        contents.aliases.forget()
        contents.settle_aliases(claims=False)
