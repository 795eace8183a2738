"""A loader as the loop sees it: the torch loader within it, its samplers, its generators and its state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from torch.utils.data import DistributedSampler, IterableDataset

from checkpointer_torch.foreign_loaders import TORCH, is_stateful, length_of, torch_loader
from checkpointer_torch.object_parts import Part
from checkpointer_torch.random_state import accessors
from checkpointer_torch.read_ahead import ReadAhead

_WITHIN: Final = ("sampler", "batch_sampler", "root", "source")
"""Attributes in which samplers, and the nodes of ``torchdata.nodes``, keep one another."""


class LoaderView(Part):
    """Finds what a loader of any package consists of."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.kind = type(loader).__name__
        """The name of its class, for messages."""
        self.inner: Any = torch_loader(loader)
        """The ``DataLoader`` that loads the data; None for any other iterable."""
        self._root = loader if self.inner is None else self.inner
        self._is_read_again = False
        """Whether the place is found by reading the data again, although it has an index or a state."""
        self.stateful: Any = None
        """The object whose ``state_dict`` has the place of the loader; None without one."""
        if self.inner is None or is_stateful(self.inner):  # The wrapper of accelerate has the methods, and they fail.
            self.stateful = loader if is_stateful(loader) else self.inner
        module = str(getattr(getattr(type(self.inner), "state_dict", None), "__module__", ""))
        self.is_torchdata = module.startswith("torchdata.stateful_dataloader.")
        """Whether the ``state_dict`` is the one of ``torchdata.StatefulDataLoader``."""
        if type(loader).__name__ == "DataLoaderDispatcher" and self.inner is not None:
            # Rank 0 of accelerate reads for all, ahead of its own state. It fills the last batch from the first one,
            # and fails if the rest is empty.
            is_stream = isinstance(self.inner.dataset, IterableDataset)
            self._is_read_again = loader.state.num_processes > 1 or not is_stream
            self.stateful = None if self._is_read_again else self.stateful
        self._ahead: ReadAhead | None = None

    @property
    def is_indexed(self) -> bool:
        """Whether the batches that were used can be skipped by their indices.

        A ``StatefulDataLoader`` needs its own state only if its dataset or sampler has a state.
        """
        if self.inner is None or self._is_read_again or isinstance(self.inner.dataset, IterableDataset):
            return False
        if not is_stateful(self.inner):
            return True
        return self.is_torchdata and not any(map(is_stateful, (self.inner.dataset, *self.samplers)))

    def is_used_up(self, used: int) -> bool:
        """Return whether a pass of a loader with a state of its own, which has a length, has no more batches.

        Torchdata's loaders know it themselves, and their length need not be that of a stream.
        """
        own = self.stateful is not None and not self.is_torchdata and not self.is_indexed
        return own and bool(used) and used == length_of(self.loader)

    @property
    def is_warm(self) -> bool:
        """Whether workers that outlive a pass are running: then a pass draws no new seed for them."""
        return self.inner is not None and self.inner.persistent_workers and self.inner._iterator is not None

    @property
    def samplers(self) -> list[Any]:
        """The samplers and the samplers within those; for ``torchdata.nodes`` also the nodes.

        For any other iterable they are those of the loaders that it holds.
        """
        found: dict[int, Any] = {}
        if self.inner is None:
            held = getattr(self.loader, "__dict__", {}).values()
            found = {id(one): one for one in held if torch_loader(one) is not None}
        to_visit = [self._root, *found.values()]
        for holder in to_visit:  # It grows meanwhile.
            held_by = [getattr(holder, name, None) for name in _WITHIN]
            if type(holder).__name__ == "DistributedSamplerWrapper":  # Lightning's, around a sampler of the user.
                held_by.append(getattr(holder.dataset, "_sampler", None))
            for one in held_by:
                if one is not None and id(one) not in found:
                    found[id(one)] = one
                    to_visit.append(one)
        return list(found.values())

    @property
    def distributed_sampler(self) -> Any:
        """The sampler that gives each process its samples, if its order is known for any number of them; else None."""
        if self.inner is None or isinstance(self.inner.dataset, IterableDataset) or is_stateful(self.inner.dataset):
            return None
        batches = self.inner.batch_sampler
        sampler = getattr(batches, "sampler", None)
        if not isinstance(sampler, DistributedSampler):
            return None
        is_known = all(str(type(each).__iter__.__module__).startswith(TORCH) for each in (batches, sampler))
        return sampler if is_known else None

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the loader, its samplers and its dataset."""
        if "_num_iter_calls" in getattr(self.loader, "__dict__", {}):
            self.loader._num_iter_calls = epoch  # Fabric counts passes, and sets that as the epoch of the samplers.
        holders = [self.loader, self._root, *self.samplers]
        holders += [getattr(holder, "dataset", None) for holder in holders]
        for holder in {id(holder): holder for holder in holders}.values():
            if hasattr(holder, "set_epoch"):
                holder.set_epoch(epoch)

    def keep_epoch(self, epoch: int) -> None:
        """Set the epoch of samplers again where the loader's ``__iter__`` set another, from a count of its own."""
        for sampler in self.samplers:
            if hasattr(sampler, "set_epoch") and getattr(sampler, "epoch", epoch) != epoch:
                sampler.set_epoch(epoch)

    def watch(self, iterator: Any, used: int, replayed: Iterable[Any]) -> None:
        """Remember the random states of the reads, if this loader may read more batches than it has given."""
        modules = [type(one).__iter__.__module__ for one in (self.loader, self.inner)]
        is_plain = all(module.startswith(("torch.", "torchdata.", "lightning", "tqdm.")) for module in modules)
        if not is_plain and not self.inner.num_workers:
            self._ahead = ReadAhead(iterator, used, replayed)

    def take_ahead(self, used: int) -> list[Any]:
        """Return the random states before each read of a batch that is not among the used ones."""
        return [] if self._ahead is None else self._ahead.take(used)

    def forget(self) -> None:
        """Let a ``DataLoader`` begin its next pass at the beginning."""
        if self.is_torchdata or getattr(self.inner, "persistent_workers", False):
            self.inner._iterator = None
        if self.is_torchdata:
            self.inner.next_iter_state = None
            self.inner._initial_iter_for_state_dict = False

    # Its state

    @property
    def _generators(self) -> list[tuple[Callable[[], Any], Callable[[Any], object]]]:
        holders = (self._root, *self.samplers)
        held = {id(value): value for holder in holders for value in list(getattr(holder, "__dict__", {}).values())}
        return [access for access in map(accessors, held.values()) if access is not None]

    def take_generators(self) -> list[Any]:
        """Return the states of the random generators that the loader and its samplers hold."""
        return [read() for read, _ in self._generators]

    def put_generators(self, states: Iterable[Any]) -> None:
        """Put the generators into the states that `take_generators` returned."""
        for (_, write), state in zip(self._generators, states, strict=False):
            write(state)

    def take(self) -> Any:
        """Return the state of the loader: its own, or the states of its random generators."""
        if self.stateful is None:
            return self.take_generators()
        if self.is_torchdata and (self.inner._iterator is None or self.inner._iterator._finished):
            # state_dict() or load_state_dict() would begin a pass, which draws from the random numbers of the training.
            if self.inner.next_iter_state is None and self.is_indexed:
                return self.take_generators()
            if self.inner._iterator is None:
                return self.inner.next_iter_state or {}
        return self.stateful.state_dict()

    def put(self, state: Any) -> None:
        """Put the loader into the state that `take` returned."""
        if self.stateful is None or isinstance(state, list):
            self.forget()
            self.put_generators(state)
        else:
            self.stateful.load_state_dict(state)
