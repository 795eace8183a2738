"""The aliases of one run in one directory: which names are free for them, and what they point to."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection

import attrs

from checkpointer.commit import index
from checkpointer.commit.transaction import Transaction
from checkpointer.errors import CheckpointerWarning
from checkpointer.policy.policy import Policy
from checkpointer.ports import SupportsLinks
from checkpointer.records.manifest import Manifest

__all__ = ["Aliases"]


@attrs.define
class Aliases:
    """Chooses alias names that replace nothing of others, and swings them; the directory tells it what is there."""

    transaction: Transaction
    asked: Policy
    """The policy with the alias names that were asked for."""
    damaged: Collection[str]
    """Paths of record files that cannot be read or believed."""
    _pointed: dict[str, str] = attrs.field(factory=dict, init=False)
    """Token of the checkpoint that each alias was pointed to."""
    _claimed: set[str] = attrs.field(factory=set, init=False)
    """Names that are this manager's, even if the marks that say so are deleted."""

    def settle(self, manifest: Manifest, say: Callable[[str, str], None], *, slots: bool, claim: bool) -> Policy:
        """Return the policy with alias names that are free; with ``claim`` keep them, and ``say`` where they differ.

        ``slots``: a checkpoint of another run under the alias counts as well.
        """
        naming = self.asked.name
        for field in ("last", "best"):
            if not getattr(self.asked, field):
                continue
            stem = getattr(self.asked.name, field)
            name = naming.free_name(stem, _Blocked(self, manifest, slots))
            naming = attrs.evolve(naming, **{field: name.removesuffix(naming.suffix)})  # type: ignore[arg-type]
            if claim:
                self.transaction.claim(name, manifest.label)
                self._claimed.add(name)
            if claim and name != stem + naming.suffix:
                say(name, f"{stem}{naming.suffix} is not this run's; the alias is {name} instead")
        return attrs.evolve(self.asked, name=naming)

    def point(self, policy: Policy, manifest: Manifest) -> Manifest:
        """Let ``last`` and ``best`` name what they should; return the manifest without slots that made way for one."""
        history = manifest.history
        last = history[-1] if history else None
        targets = {policy.name.last_file: last, policy.name.best_file: policy.best_of(history)}
        for alias, how in policy.aliases.items():
            target = targets[alias]
            if target is None:
                self._remove_dangling(alias)
            if target is None or target.name == alias or self._pointed.get(alias) == target.token:
                continue
            slot = manifest.by_name.get(alias) or next((r for r in manifest.aside if r.name == alias), None)
            try:
                self.transaction.alias(alias, how, target, slot=slot)
            except OSError as error:
                msg = f"the alias {alias} could not be made ({error}); {target.name} itself is saved"
                warnings.warn(msg, CheckpointerWarning, stacklevel=5)
                continue
            self._pointed[alias] = target.token
            if slot is not None:
                manifest = manifest.without(alias)
        return manifest

    def _remove_dangling(self, alias: str) -> None:
        """Remove a link whose target is gone, when nothing takes its place; a copy is a whole checkpoint and stays."""
        storage = self.transaction.storage
        if isinstance(storage, SupportsLinks) and storage.list(alias):
            try:
                storage.open(alias).close()
            except FileNotFoundError:
                self.forget(alias)
                with contextlib.suppress(OSError):
                    storage.delete(alias)
            except OSError:  # A folder.
                return

    def forget(self, alias: str | None = None) -> None:
        """Count an alias, or all, as pointing nowhere: something else has taken its place, or its owner is another."""
        if alias is None:
            self._pointed.clear()
        else:
            self._pointed.pop(alias, None)

    def is_blocked(self, alias: str, manifest: Manifest, *, slots: bool) -> bool:
        """Return whether the alias would replace a file of others; ``slots``: or a checkpoint of another run."""
        record = manifest.by_name.get(alias)
        if record is None and slots:
            record = self.transaction.committed(alias)
        if record is not None:
            return slots and (record.run, record.label) != (manifest.run, manifest.label)
        if index.record_path(alias) in self.damaged:
            return True
        if alias in self._claimed or not self._is_foreign(alias, manifest.foreign):
            return False
        return not self.transaction.is_marked(alias)

    def _is_foreign(self, alias: str, foreign: frozenset[str]) -> bool:
        """Return whether a file of others has the name; where case does not tell names apart, the storage knows."""
        folded = alias.casefold()
        listed = self.transaction.storage.list
        return alias in foreign or (any(name.casefold() == folded for name in foreign) and bool(listed(alias)))


@attrs.frozen
class _Blocked:
    """The alias names that are not free, as a container that is asked name by name."""

    aliases: Aliases
    manifest: Manifest
    slots: bool

    def __contains__(self, alias: object) -> bool:
        return self.aliases.is_blocked(str(alias), self.manifest, slots=self.slots)
