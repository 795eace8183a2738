"""A checkpoint manager that knows nothing about the training loop, and loses nothing when it is killed."""

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
