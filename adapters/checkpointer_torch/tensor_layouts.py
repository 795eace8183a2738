"""How a tensor lies on the processes, and how a tensor that was saved in another layout gets there."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs
import torch

from checkpointer.errors import MismatchError
from checkpointer.formats.pickler import is_dtensor, is_whole_dtensor

_CONTAINERS: Final = (list, tuple)


@attrs.frozen
class Layout:
    """The device mesh of a DTensor, as its shape, and the placement along each dimension of the mesh."""

    mesh: tuple[int, ...]
    placements: tuple[Any, ...]

    @classmethod
    def of(cls, tensor: Any) -> Layout | None:
        """Return the layout of a DTensor; None for any other tensor."""
        return cls(tuple(tensor.device_mesh.shape), tuple(tensor.placements)) if is_dtensor(tensor) else None

    def to_plain(self) -> list[Any]:
        """Return it as plain data."""
        fields = ("dim", "split_factor")
        described = (
            [type(placed).__name__, *(getattr(placed, field) for field in fields if hasattr(placed, field))]
            for placed in self.placements
        )
        return [list(self.mesh), list(described)]

    @classmethod
    def from_plain(cls, plain: Sequence[Any]) -> Layout:
        """Return what `to_plain` described. Raises `MismatchError` for a placement that this version does not know."""
        from torch.distributed.tensor import Replicate, Shard
        from torch.distributed.tensor.placement_types import _StridedShard

        known: dict[str, Any] = {
            "Replicate": Replicate,
            "Shard": Shard,
            "_StridedShard": lambda dim, factor: _StridedShard(dim, split_factor=factor),
        }
        mesh, described = plain
        for name, *_ in described:
            if name not in known:
                msg = f"the checkpoint has a tensor that is placed as {name}; expected {', '.join(known)}"
                raise MismatchError(msg)
        return cls(tuple(mesh), tuple(known[name](*fields) for name, *fields in described))


def room_for(
    name: str, like: Any, meshes: Sequence[Any], *, saved: Layout | None, shape: tuple[int, ...], dtype: torch.dtype
) -> Any:
    """Return an empty tensor to read into: one that lies as ``like``, if it has the shape, or as it was saved.

    ``saved`` is None if the tensor was not spread.

    Raises:
        MismatchError: If neither is possible.
    """
    if isinstance(like, torch.Tensor) and tuple(like.shape) == shape and (saved or shape or not is_dtensor(like)):
        here = Layout.of(like)
        if here is None:
            return torch.empty(shape, dtype=dtype, device=like.device)
        if saved is None or saved.mesh != here.mesh or saved == here:
            return torch.empty_like(like, dtype=dtype, requires_grad=False)
        return _empty(shape, dtype, like.device_mesh, saved.placements)  # type: ignore[attr-defined]
    if saved is None or not meshes:
        return torch.empty(shape, dtype=dtype)
    mesh = next((mesh for mesh in meshes if mesh.ndim == len(saved.mesh)), None)
    if mesh is None:
        msg = (
            f"{name} cannot be moved: it was saved on a mesh of {_sizes(saved.mesh)} processes, and it does not "
            f"have the shape of a parameter; this training has a mesh of {_sizes(meshes[0].shape)}"
        )
        raise MismatchError(msg)
    return _empty(shape, dtype, mesh, saved.placements)


def _sizes(mesh: Sequence[int]) -> str:
    return "x".join(map(str, mesh))


def _empty(shape: tuple[int, ...], dtype: torch.dtype, mesh: Any, placements: tuple[Any, ...]) -> Any:
    from torch.distributed.tensor import empty

    return empty(shape, dtype=dtype, device_mesh=mesh, placements=placements)


def fitted(own: Any, state: Any) -> Any:
    """Return a state whose tensors lie as those of ``own`` do: what is whole there is spread here, or is plain."""
    if isinstance(own, torch.Tensor) and isinstance(state, torch.Tensor):
        return _as(own, state)
    if isinstance(own, Mapping) and isinstance(state, Mapping):
        return _with(state, {key: fitted(own[key], item) for key, item in state.items() if key in own})
    if isinstance(own, _CONTAINERS) and type(state) in _CONTAINERS and len(own) == len(state):
        return _with(state, dict(enumerate(map(fitted, own, state))))
    return state


def _as(own: Any, tensor: Any) -> Any:
    if is_whole_dtensor(tensor) and not (is_dtensor(own) and own.device_mesh == tensor.device_mesh):
        tensor = tensor.to_local()
    if not is_dtensor(own) or is_dtensor(tensor) or own.shape != tensor.shape:
        return tensor
    return spread(tensor, own)


@torch.no_grad()
def spread(whole: torch.Tensor, like: Any) -> Any:
    """Return a DTensor that lies as ``like`` does, with the numbers of a whole tensor that every rank has."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    room: Any = torch.empty_like(like, dtype=whole.dtype, requires_grad=False)
    sizes, offsets = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    mine: torch.Tensor = room.to_local()
    if tuple(mine.shape) != tuple(sizes):
        msg = f"a tensor of the shape {list(like.shape)} cannot be spread as {like.placements}: the parts are not even"
        raise MismatchError(msg)
    for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        whole = whole.narrow(dim, min(offset, whole.shape[dim]), size)
    mine.copy_(whole)
    return room


def whole_of(state: Any) -> Any:
    """Return a state in which a DTensor that this process holds all of is a plain tensor."""
    if is_whole_dtensor(state):
        return state.to_local()
    if isinstance(state, dict):
        return _with(state, {key: whole_of(item) for key, item in state.items()})
    if type(state) in _CONTAINERS:
        return _with(state, dict(enumerate(map(whole_of, state))))
    return state


def _with(state: Any, changed: Mapping[Any, Any]) -> Any:
    """Return a container with changed items by their keys; if none has changed, the container itself."""
    if all(item is state[key] for key, item in changed.items()):
        return state
    if type(state) in _CONTAINERS:
        return type(state)(changed.values())
    result = copy.copy(state)
    result.update(changed)
    return result
