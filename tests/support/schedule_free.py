"""A small schedule-free optimizer: the model has either the weights of training, or those of evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["ScheduleFree"]


class ScheduleFree(torch.optim.Optimizer):
    """Gradients at y move z. The result x is the average of all z, and y lies between x and z."""

    def __init__(self, parameters: Iterable[torch.Tensor], lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr, "beta": 0.5, "count": 0, "train_mode": False})

    def train(self) -> None:
        """Put y into the model."""
        self._swap(True, lambda group: 1 - group["beta"])

    def eval(self) -> None:
        """Put x into the model."""
        self._swap(False, lambda group: 1 - 1 / group["beta"])

    @torch.no_grad()
    def _swap(self, mode: bool, weight: Any) -> None:
        for group in self.param_groups:
            if group["train_mode"] != mode:
                for parameter in group["params"]:
                    if parameter in self.state:
                        parameter.lerp_(self.state[parameter]["z"], weight(group))
                group["train_mode"] = mode

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move z, and with it x and y."""
        for group in self.param_groups:
            assert group["train_mode"], "call train() first"
            group["count"] += 1
            for y in group["params"]:
                z = self.state[y].setdefault("z", y.clone())
                x = y.lerp(z, 1 - 1 / group["beta"])
                z.sub_(y.grad, alpha=group["lr"])
                x.lerp_(z, 1 / group["count"])
                y.copy_(x.lerp(z, 1 - group["beta"]))
