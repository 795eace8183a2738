"""Checkpoints for a hand-written PyTorch loop: exact resume, signals, saves on demand, and weights to start from."""

from __future__ import annotations

from checkpointer_torch.loop import Loop
from checkpointer_torch.settings import read_config
from checkpointer_torch.signals import StopTraining
from checkpointer_torch.training_position import LoopProgress
from checkpointer_torch.weights import LoadedWeights, load_weights

__all__ = ["LoadedWeights", "Loop", "LoopProgress", "StopTraining", "load_weights", "read_config"]
