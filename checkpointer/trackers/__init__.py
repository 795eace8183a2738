"""Listeners that report durable checkpoints to experiment trackers.

Each listener imports its tracker's package when the listener is created::

    from checkpointer.trackers.mlflow_tracker import MLflowTracker
    from checkpointer.trackers.wandb_tracker import WandbTracker
    from checkpointer.trackers.tensorboard_tracker import TensorBoardTracker
"""

__all__: list[str] = []
