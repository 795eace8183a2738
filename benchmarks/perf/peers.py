"""What a user would take instead of this library, each as calls on a state and a path.

A text in the place of a call says why there is none.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from perf.sides import State

Save = Callable[[State, str], object]
Wait = Callable[[], object]
Loads = Callable[[State, str], Callable[[], State]]
"""Writes a state to a path; returns what loads it."""


@dataclass(frozen=True)
class Peer:
    """One of them."""

    name: str
    packages: tuple[str, ...]
    save: Save | str
    """Returns when the library says that the checkpoint is written."""
    behind: tuple[Save, Wait] | str
    """Begins a save and returns when the state may change; waits for the end of that save."""
    loads: dict[str, Loads] | str
    """By what the row adds to the name."""

    def version(self) -> str:
        """Return the names and versions of its packages."""
        return ", ".join(f"{name} {metadata.version(name)}" for name in self.packages)


def dcp() -> Peer:
    """torch.distributed.checkpoint, in one process."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    from torch.distributed.checkpoint.state_dict_loader import load as load_dcp
    from torch.distributed.checkpoint.state_dict_saver import async_save
    from torch.distributed.checkpoint.state_dict_saver import save as save_dcp

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    stager = DefaultStager(StagingOptions(False, False, False, False))
    futures: list[Any] = []

    def begin(state: State, path: str) -> None:
        answer = async_save(state, checkpoint_id=path, async_stager=stager)
        futures.append(getattr(answer, "upload_completion", answer))

    def loads(state: State, path: str) -> Callable[[], State]:
        save_dcp(state, checkpoint_id=path)

        def load() -> State:
            into = {name: torch.empty_like(tensor) for name, tensor in state.items()}
            load_dcp(into, checkpoint_id=path)
            return into

        return load

    save = lambda state, path: save_dcp(state, checkpoint_id=path)  # noqa: E731
    return Peer("DCP", ("torch",), save, (begin, lambda: futures.pop().result()), {"": loads})


def lightning() -> Peer:
    """Lightning's plugins for checkpoints."""
    from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

    plain = TorchCheckpointIO()
    plugins: list[Any] = []

    def begin(state: State, path: str) -> None:
        plugins.append(AsyncCheckpointIO(TorchCheckpointIO()))
        plugins[-1].save_checkpoint(state, path)

    def loads(state: State, path: str) -> Callable[[], State]:
        plain.save_checkpoint(state, path)
        return lambda: plain.load_checkpoint(path)

    behind = begin, lambda: plugins.pop().teardown()
    return Peer("Lightning", ("lightning",), plain.save_checkpoint, behind, {"": loads})


def orbax() -> Peer:
    """Orbax, which saves arrays of JAX and numpy."""
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)
    behind = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
    blocking = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())

    def saved(state: State) -> Any:
        return ocp.args.PyTreeSave({name: tensor.numpy() for name, tensor in state.items()})

    def loads(state: State, path: str) -> Callable[[], State]:
        blocking.save(os.path.abspath(path), args=saved(state))
        kinds = {name: ocp.RestoreArgs(restore_type=type(tensor.numpy())) for name, tensor in state.items()}

        def load() -> State:
            found = blocking.restore(os.path.abspath(path), args=ocp.args.PyTreeRestore(restore_args=kinds))
            return {name: torch.from_numpy(array) for name, array in found.items()}

        return load

    def save(state: State, path: str) -> None:
        blocking.save(os.path.abspath(path), args=saved(state))

    def begin(state: State, path: str) -> None:
        behind.save(os.path.abspath(path), args=saved(state))

    return Peer("Orbax", ("orbax-checkpoint", "jax"), save, (begin, behind.wait_until_finished), {"": loads})


def torch_checkpointing() -> Peer:
    """Meta's torch-checkpointing. Its direct I/O fails on ext4 and xfs, because its writes are not aligned."""
    import torch_checkpointing as tc
    from torch_checkpointing.config import (
        AsyncCheckpointSaverConfig,
        CheckpointLoaderConfig,
        SyncCheckpointSaverConfig,
    )
    from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

    def manager(how: Any, *, use_mmap: bool = True) -> Any:
        items = {"state": tc.ItemSpec()}
        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        loading = CheckpointLoaderConfig(use_mmap=use_mmap)
        return tc.CheckpointManager.Config(items=items, save=how, load=loading, storage_config=storage).build()

    blocking = manager(SyncCheckpointSaverConfig())
    # Or it opens a file for each tensor, in both processes.
    torch.multiprocessing.set_sharing_strategy("file_system")  # type: ignore[no-untyped-call]
    managers: list[Any] = []
    futures: list[Any] = []

    def save(state: State, path: str) -> None:
        blocking.save(path, {"state": state})

    def begin(state: State, path: str) -> None:
        managers[:] = managers or [manager(AsyncCheckpointSaverConfig())]
        futures.append(managers[0].save(path, {"state": state}))
        with managers[0].lock():  # Before that, the state must not change.
            pass

    def loading(*, use_mmap: bool) -> Loads:
        def loads(state: State, path: str) -> Callable[[], State]:
            save(state, path)
            loader = manager(SyncCheckpointSaverConfig(), use_mmap=use_mmap)
            return lambda: loader.load(path)["state"]

        return loads

    loads = {"": loading(use_mmap=False), "mmap": loading(use_mmap=True)}
    behind = begin, lambda: futures.pop().result()
    return Peer("torch-checkpointing", ("torch-checkpointing",), save, behind, loads)


def ignite() -> Peer:
    """What ignite's ModelCheckpoint writes with."""
    from ignite.handlers import DiskSaver

    def save(state: State, path: str) -> None:
        DiskSaver(path, create_dir=True, require_empty=False)(state, "state.pt")

    return Peer("ignite", ("pytorch-ignite",), save, "it saves in the loop only", "its user calls torch.load")


def safetensors() -> Peer:
    """The format of Hugging Face, for tensors only."""
    from safetensors.torch import load_file, save_file

    def loads(state: State, path: str) -> Callable[[], State]:
        save_file(state, path)
        return lambda: load_file(path)

    return Peer("safetensors", ("safetensors",), save_file, "it saves in the loop only", {"mmap": loads})


def fastsafetensors() -> Peer:
    """A loader of safetensors, meant for GPUs."""
    from fastsafetensors import fastsafe_open
    from safetensors.torch import save_file

    def loads(state: State, path: str) -> Callable[[], State]:
        save_file(state, path)

        def load() -> State:
            with fastsafe_open(path, device="cpu", nogds=True) as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

        return load

    why = "its saver takes each tensor with a function that fills a map, not a state"
    return Peer("fastsafetensors", ("fastsafetensors",), why, why, {"": loads})


FINDERS: dict[str, Callable[[], Peer]] = {
    "DCP": dcp,
    "Lightning": lightning,
    "Orbax": orbax,
    "torch-checkpointing": torch_checkpointing,
    "ignite": ignite,
    "safetensors": safetensors,
    "fastsafetensors": fastsafetensors,
}
"""By the names of the peers."""


def find() -> tuple[list[Peer], list[str]]:
    """Return the peers that are installed, and for each other why it cannot be imported."""
    peers, missing = [], []
    for name, finder in FINDERS.items():
        try:
            peers.append(finder())
        except ImportError as error:
            missing.append(f"{name}: {error}")
    return peers, missing
