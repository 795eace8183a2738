"""Listeners that report durable checkpoints to experiment trackers. Each needs a package, imported when it is made.

::

    from checkpointer.trackers.mlflow_tracker import MLflowTracker
    from checkpointer.trackers.wandb_tracker import WandbTracker
    from checkpointer.trackers.tensorboard_tracker import TensorBoardTracker
"""

__all__: list[str] = []
