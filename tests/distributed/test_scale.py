"""What a save and a restore cost as ranks, files and tensors grow: counted. docs/scale.md has the formulas."""

from __future__ import annotations

import contextlib
import functools
import urllib.error
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from support.sampling import EVERY
from support.servers.counting import CountingProxy
from support.servers.fixtures import Serve
from support.together import together
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from checkpointer import CheckpointManager, EverySteps, KeepLast, Policy
from checkpointer.distributed.manager import DistributedManager
from checkpointer.errors import CheckpointerError
from checkpointer.formats.dcp_folder import DcpFormat
from checkpointer.records.digest_algorithms import DIGESTS

pytestmark = pytest.mark.slow

POLICY = Policy(EverySteps(2), [KeepLast(1)], name="{step}")


class Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the collectives of this thread, and the bytes of each: those of its largest side on this rank."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = func.name().removeprefix("c10d::").strip("_")
            self.calls[kind] += 1
            self.bytes[kind] += max(map(_bytes, args))
        return func(*args, **(kwargs or {}))


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0


def state(tensors: int, *, is_sharded: bool) -> dict[str, Any]:
    """Return a small state, of which each rank has a part or the whole."""
    parts = {f"layer {number}": torch.ones(4) for number in range(tensors)}
    if not is_sharded:
        return parts
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    return {name: DTensor.from_local(part, mesh, [Shard(0)], run_check=False) for name, part in parts.items()}


def counted(rank: int, directory: str, tensors: int) -> dict[str, Any]:
    """Return the calls and bytes of a step that is not due, a save that retires one, and a restore."""
    found: dict[str, Any] = {}
    for format in ("torch", "dcp"):
        own = state(tensors, is_sharded=format == "dcp")
        take: Callable[[], dict[str, Any]] = functools.partial(dict, own)
        with DistributedManager(f"{directory}/{format}", POLICY, state=take, format=format) as manager:
            for step in (2, 4):
                manager.observe({}, step, 0, epoch_end=False)
            with Collectives() as quiet:
                manager.observe({}, 5, 0, epoch_end=False)
            with Collectives() as save:
                manager.observe({}, 6, 0, epoch_end=False)
            with Collectives() as restore:
                manager.restore()
        acts = {"quiet": quiet, "save": save, "restore": restore}
        found |= {f"{format} {name}": (dict(act.calls), dict(act.bytes)) for name, act in acts.items()}
    return found


CALLS = {
    "torch quiet": {},
    "torch save": {"broadcast": 4, "allgather": 2},
    "torch restore": {"broadcast": 2, "allgather": 2},
    "dcp quiet": {},
    "dcp save": {"broadcast": 9, "allgather": 6, "gather": 2, "scatter": 2},
    "dcp restore": {"broadcast": 7, "allgather": 7, "gather": 1, "scatter": 2},
}
"""On each rank. DCP makes 3 broadcasts, 2 all-gathers, and all gathers and scatters of them."""


def at_most(ranks: int, tensors: int) -> dict[str, dict[str, int]]:
    """Return the bytes that pass rank 0, as docs/scale.md has them, and a quarter more: a pickle's size varies."""
    return {
        "torch save": {"broadcast": 1800, "allgather": 30 * ranks},
        "torch restore": {"broadcast": 1500, "allgather": 15 * ranks},
        "dcp save": {
            "broadcast": 2500 + 72 * ranks,
            "allgather": 80 * ranks,
            "gather": ranks * (1050 + 330 * tensors),
            "scatter": ranks * (730 + 180 * tensors),
        },
        "dcp restore": {
            "broadcast": 1900 + 140 * ranks,
            "allgather": 85 * ranks,
            "gather": ranks * (390 + 155 * tensors),
            "scatter": ranks * (400 + 155 * tensors),
        },
    }


@pytest.mark.parametrize(
    ("ranks", "tensors"), [(2, 11), (4, 1)] if EVERY > 1 else [(2, 1), (2, 11), (4, 1), (8, 1), (16, 1)]
)
def test_the_number_of_collectives_is_fixed_and_their_bytes_grow_with_the_ranks_alone(
    tmp_path: Path, ranks: int, tensors: int
) -> None:
    """No rank gets what DCP's metadata says of the shards of all others, except for rank 0, which writes it."""
    for found in together(ranks, counted, str(tmp_path), tensors):
        assert CALLS == {act: calls for act, (calls, _) in found.items()}
        for act, limits in at_most(ranks, tensors).items():
            _, sizes = found[act]
            assert {} == {kind: size for kind, size in sizes.items() if size > limits[kind]}, act
    (record,) = (tmp_path / "dcp/.checkpointer/records").iterdir()
    assert record.stat().st_size < 800 + 90 * (ranks + 1)


class PhasesProxy(CountingProxy):
    """Counts the requests of each phase. A request for ``/phase`` ends one."""

    def __init__(self, upstream: int) -> None:
        self.phases: list[Counter[str]] = []
        super().__init__(upstream)

    def strikes(self, *, head: bytes) -> None:
        super().strikes(head=head)
        if head.startswith(b"GET /phase"):
            self.phases.append(self.kinds - Counter(GET=1))
            self.start()


def save_and_restore(rank: int, url: str, options: Mapping[str, Any]) -> None:
    def end_phase() -> None:
        torch.distributed.barrier()
        if rank == 0:
            with contextlib.suppress(urllib.error.HTTPError):
                urllib.request.urlopen(f"{options['endpoint_url']}/phase")
        torch.distributed.barrier()

    own = state(3, is_sharded=True)
    with DistributedManager(url, POLICY, state=lambda: own, format="dcp", storage_options=options) as manager:
        for step in (2, 4, 6):
            end_phase()
            manager.observe({}, step, 0, epoch_end=False)
        end_phase()
        manager.observe({}, 7, 0, epoch_end=False)
        end_phase()
        manager.restore()
        end_phase()


@pytest.mark.parametrize("ranks", [4] if EVERY > 1 else [2, 4, 8])
def test_a_save_of_shards_to_s3_costs_one_request_of_each_rank(serve: Serve, ranks: int) -> None:
    """Rank 0 makes all the others, among them one for each file that it removes. A restore takes four of each rank."""
    server = serve("s3")
    with (proxy := PhasesProxy(server.port)):
        through = attrs.evolve(server, port=proxy.port)
        assert [None] * ranks == together(ranks, save_and_restore, through.fresh(), dict(through.storage_options))
    *_, save, quiet, restore = proxy.phases
    assert {"list": 12, "HEAD": 3, "PUT if absent": 1, "PUT": 4 + ranks, "DELETE": 2 + ranks} == save
    assert {} == quiet
    assert {"list": 2, "HEAD": 2 * ranks, "GET": 2 * ranks} == restore


class ManyFiles(DcpFormat):
    """A DCP folder with more files than a record names."""

    def write_digested(self, state: Any, path: str, *, algorithm: str) -> Mapping[str, tuple[int, str]]:
        files = dict(super().write_digested(state, path, algorithm=algorithm))
        more = {f"more-{number}": b"" for number in range(2000)}
        MemoryFileSystem().pipe({f"{path}/{name}": data for name, data in more.items()})
        return files | dict.fromkeys(more, (0, DIGESTS[algorithm]().hexdigest()))


def test_a_folder_of_thousands_of_files_is_verified_by_its_metadata_while_it_is_read() -> None:
    """Its record stays small, and the folder is not read once more for its digest."""
    url = f"memory://{uuid.uuid4().hex}"
    with CheckpointManager(url, POLICY, state=lambda: {"w": torch.ones(5)}, format=ManyFiles()) as manager:
        manager.observe({}, 2, 0)
        record = manager.last
        assert record is not None
        assert [".metadata"] == [*record.files]
        restored = manager.restore()
        assert restored is not None
        assert torch.equal(torch.ones(5), restored.state["w"])

        shard = f"{url}/{record.name}/__0_0.distcp"
        data = bytearray(MemoryFileSystem().cat(shard))
        place = data.find(torch.ones(5).numpy().tobytes())
        data[place] ^= 1
        MemoryFileSystem().pipe(shard, bytes(data))
        with pytest.raises(CheckpointerError, match=r"w in its file __0_0\.distcp .* has other bytes"):
            manager.restore()
