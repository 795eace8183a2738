"""A checkpoint manager that knows nothing about the training loop, and loses nothing when it is killed."""

from checkpointer.deciding import Attach, Decision, Save, Skip, decide, explain
from checkpointer.errors import CheckpointerError, CheckpointerWarning
from checkpointer.manager import CheckpointManager
from checkpointer.manifest import Manifest
from checkpointer.naming import Naming
from checkpointer.policy import Policy
from checkpointer.ports import Listener
from checkpointer.ranked import RankedManager
from checkpointer.ranking import Metric
from checkpointer.records import Observation, Progress, Record
from checkpointer.restoring import Restored
from checkpointer.retention import Budget, KeepAll, KeepBest, KeepEvery, KeepLast
from checkpointer.triggers import AnyOf, AtSteps, DuringEpochs, EveryEpochs, EverySeconds, EverySteps
from checkpointer.trust import HMACKey

__version__ = "0.1.0"

__all__ = [
    "AnyOf",
    "AtSteps",
    "Attach",
    "Budget",
    "CheckpointManager",
    "CheckpointerError",
    "CheckpointerWarning",
    "Decision",
    "DuringEpochs",
    "EveryEpochs",
    "EverySeconds",
    "EverySteps",
    "HMACKey",
    "KeepAll",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "Listener",
    "Manifest",
    "Metric",
    "Naming",
    "Observation",
    "Policy",
    "Progress",
    "RankedManager",
    "Record",
    "Restored",
    "Save",
    "Skip",
    "decide",
    "explain",
]
