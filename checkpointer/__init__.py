"""A checkpoint manager that knows nothing about the training loop, and loses nothing when it is killed."""

import importlib as _importlib
import typing as _typing

if _typing.TYPE_CHECKING:
    from checkpointer.commit.signing import HMACKey
    from checkpointer.distributed.manager import DistributedManager, RankedManager
    from checkpointer.errors import CheckpointerError, CheckpointerWarning
    from checkpointer.manager import CheckpointManager
    from checkpointer.mirror.plan import Mirror
    from checkpointer.policy.decide import Attach, Decision, Save, Skip, decide, explain
    from checkpointer.policy.naming import Naming
    from checkpointer.policy.policy import Policy
    from checkpointer.policy.ranking import Metric
    from checkpointer.policy.retention import Budget, KeepAll, KeepBest, KeepEvery, KeepFor, KeepLast, KeepWhere
    from checkpointer.policy.triggers import (
        AnyOf,
        AtSteps,
        Continuous,
        DuringEpochs,
        EveryCount,
        EveryEpochs,
        EveryFraction,
        EverySeconds,
        EverySteps,
        OnImprovement,
        When,
    )
    from checkpointer.ports import Listener
    from checkpointer.records.manifest import Manifest
    from checkpointer.records.record import Observation, Progress, Record
    from checkpointer.restore.load import Restored

__version__ = "0.1.0"

__all__ = [
    "AnyOf",
    "AtSteps",
    "Attach",
    "Budget",
    "CheckpointManager",
    "CheckpointerError",
    "CheckpointerWarning",
    "Continuous",
    "Decision",
    "DistributedManager",
    "DuringEpochs",
    "EveryCount",
    "EveryEpochs",
    "EveryFraction",
    "EverySeconds",
    "EverySteps",
    "HMACKey",
    "KeepAll",
    "KeepBest",
    "KeepEvery",
    "KeepFor",
    "KeepLast",
    "KeepWhere",
    "Listener",
    "Manifest",
    "Metric",
    "Mirror",
    "Naming",
    "Observation",
    "OnImprovement",
    "Policy",
    "Progress",
    "RankedManager",
    "Record",
    "Restored",
    "Save",
    "Skip",
    "When",
    "decide",
    "explain",
]

_NAMES = {
    "commit.signing": ("HMACKey",),
    "distributed.manager": ("DistributedManager", "RankedManager"),
    "errors": ("CheckpointerError", "CheckpointerWarning"),
    "manager": ("CheckpointManager",),
    "mirror.plan": ("Mirror",),
    "policy.decide": ("Attach", "Decision", "Save", "Skip", "decide", "explain"),
    "policy.naming": ("Naming",),
    "policy.policy": ("Policy",),
    "policy.ranking": ("Metric",),
    "policy.retention": ("Budget", "KeepAll", "KeepBest", "KeepEvery", "KeepFor", "KeepLast", "KeepWhere"),
    "policy.triggers": (
        *("AnyOf", "AtSteps", "Continuous", "DuringEpochs", "EveryCount", "EveryEpochs", "EveryFraction"),
        *("EverySeconds", "EverySteps", "OnImprovement", "When"),
    ),
    "ports": ("Listener",),
    "records.manifest": ("Manifest",),
    "records.record": ("Observation", "Progress", "Record"),
    "restore.load": ("Restored",),
}
"""The names of each module. They are imported when they are used, because the command line needs few of them."""
_MODULES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> _typing.Any:
    """Import a name, or a module of the package, at its first use."""
    if name in _MODULES:
        value = getattr(_importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value
    module = f"{__name__}.{name}"
    try:
        if not name.startswith("__"):
            return _importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
