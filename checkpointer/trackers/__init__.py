"""Listeners that tell experiment trackers what became durable. Each needs its own package, imported when it is made.

::

    from checkpointer.trackers.mlflow_tracker import MLflowTracker
    from checkpointer.trackers.wandb_tracker import WandbTracker
    from checkpointer.trackers.tensorboard_tracker import TensorBoardTracker
"""

__all__: list[str] = []
