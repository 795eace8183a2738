"""The states of all random generators that a training draws from by default, as plain data."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

from checkpointer.errors import warn
from checkpointer_torch.state_differences import are_alike

_SEED: Final = "seed_seq"
"""Where the state of a bit generator has that of its seed sequence."""


def take_random_state() -> dict[str, Any]:
    """Return the state of python's, numpy's (if imported), torch's and every CUDA device's generator."""
    state = plain_random_state(raw_random_state())
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def raw_random_state() -> dict[str, Any]:
    """Return the states of the generators of the host as they give them, in less time than `take_random_state`."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if numpy := sys.modules.get("numpy"):
        state["numpy"] = numpy.random.get_state(legacy=False)
    return state


def plain_random_state(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `raw_random_state` has returned as plain data, which `put_random_state` takes."""
    version, numbers, gauss = raw["python"]
    state = {**raw, "python": [version, torch.tensor(numbers, dtype=torch.int64), gauss]}
    if "numpy" in raw:
        state["numpy"] = _as_plain(raw["numpy"])
    return state


def put_random_state(state: Mapping[str, Any]) -> None:
    """Go on with the random numbers from where `take_random_state` was called."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        with contextlib.suppress(ImportError):
            import numpy as np

            np.random.set_state(_as_numpy(state["numpy"]))
    devices = state.get("cuda", [])
    here = torch.cuda.device_count() if devices else 0
    if len(devices) > here:
        msg = f"not exact: the checkpoint has random states of {len(devices)} CUDA devices, and this process has {here}"
        warn(msg)
    for device, of_device in enumerate(devices[:here]):
        torch.cuda.set_rng_state(of_device, device)


def same_random_state(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether nothing was drawn between two calls of `take_random_state`, other than on CUDA."""
    return are_alike({**state, "cuda": []} for state in (one, other))


def _as_plain(value: Any) -> Any:
    """Return a generator's state without numpy's own types, which a safe load refuses."""
    if isinstance(value, dict):
        return {key: _as_plain(item) for key, item in value.items()}
    if not hasattr(value, "tolist"):
        return value
    return {"dtype": str(value.dtype), "values": value.tolist()} if value.ndim else value.item()


def _as_numpy(value: Any) -> Any:
    """Return the state that `_as_plain` was given."""
    if not isinstance(value, dict):
        return value
    if set(value) != {"dtype", "values"}:
        return {key: _as_numpy(item) for key, item in value.items()}
    import numpy as np

    return np.array(value["values"], dtype=value["dtype"])


def accessors(thing: Any) -> tuple[Callable[[], Any], Callable[[Any], object]] | None:
    """Return a reader and a writer of a random generator's state; None for anything else."""
    if isinstance(thing, torch.Generator):
        return thing.get_state, thing.set_state
    if isinstance(thing, random.Random):
        return thing.getstate, thing.setstate
    numpy = sys.modules.get("numpy")
    if numpy and isinstance(thing, numpy.random.RandomState):
        return lambda: _as_plain(thing.get_state(legacy=False)), lambda state: thing.set_state(_as_numpy(state))
    if numpy and isinstance(thing, numpy.random.Generator):
        bits = thing.bit_generator
        return lambda: _bits_as_plain(bits), lambda state: _put_bits(bits, state)
    return None


def _bits_as_plain(bits: Any) -> dict[str, Any]:
    """Return the state of a bit generator of numpy, and that of its seed sequence, which ``spawn`` goes by."""
    state: dict[str, Any] = _as_plain(bits.state)
    seed = getattr(bits.seed_seq, "state", None)  # A seed sequence need not be numpy's own.
    return state if seed is None else {**state, _SEED: {key: _numbers_as_text(value) for key, value in seed.items()}}


def _put_bits(bits: Any, state: Mapping[str, Any]) -> None:
    bits.state = _as_numpy({key: value for key, value in state.items() if key != _SEED})
    seed, now = state.get(_SEED), _bits_as_plain(bits).get(_SEED)
    if seed is None or seed == now:
        return
    import numpy as np

    sequence = np.random.SeedSequence(
        _text_as_numbers(seed["entropy"]),
        spawn_key=_text_as_numbers(seed["spawn_key"]),
        pool_size=_text_as_numbers(seed["pool_size"]),
        n_children_spawned=_text_as_numbers(seed["n_children_spawned"]),
    )
    try:
        bits.__setstate__((bits.state, sequence))
    except TypeError:  # numpy 1 cannot exchange it.
        warn("not exact: numpy 1 cannot put back what spawn() of a Generator gives next; numpy 2 can")


def _numbers_as_text(value: Any) -> Any:
    """Return an integer, or a sequence of integers, as text, because a safe load refuses very large ones."""
    is_one = not isinstance(value, (list, tuple)) and not getattr(value, "ndim", 0)
    return str(value) if is_one else [str(one) for one in value]


def _text_as_numbers(value: Any) -> Any:
    return [int(one) for one in value] if isinstance(value, list) else int(value)
