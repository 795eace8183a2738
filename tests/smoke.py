"""Uses an installed wheel as a new user would: save, restore with a new manager, load without the library.

Run by ``make wheel-test`` in an environment that has the wheel and nothing else; no test framework is there.
"""

from __future__ import annotations

import tempfile
from importlib import metadata, resources
from pathlib import Path

import checkpointer_torch
import torch

import checkpointer
from checkpointer import CheckpointManager, EverySteps, KeepBest, KeepLast, Policy

POLICY = Policy(EverySteps(10), [KeepBest(1, "loss", mode="min"), KeepLast(1)], last="link")
LOSSES = {10: 0.5, 20: 0.1, 30: 0.3}


def main() -> None:
    assert checkpointer.__version__ == metadata.version("torch-checkpointer")
    for package in (checkpointer, checkpointer_torch):
        assert resources.files(package).joinpath("py.typed").is_file(), "the wheel has no py.typed"
    with tempfile.TemporaryDirectory() as folder:
        saved = save(folder)
        restore(folder, saved)
    where = Path(checkpointer.__file__).parent
    print(f"torch-checkpointer {checkpointer.__version__} in {where}: saved and restored")


def save(folder: str) -> dict[str, torch.Tensor]:
    model = torch.nn.Linear(4, 2)
    with CheckpointManager(folder, POLICY, state=lambda: {"model": model.state_dict()}) as manager:
        for step, loss in LOSSES.items():
            torch.nn.init.normal_(model.weight)
            decision = manager.observe({"loss": loss}, step=step, epoch=0)
            assert decision, decision
        assert [record.step for record in manager.records] == [20, 30], manager.records
    return model.state_dict()


def restore(folder: str, saved: dict[str, torch.Tensor]) -> None:
    with CheckpointManager(folder, POLICY, state=dict) as manager:
        restored = manager.restore()
        assert restored is not None
        assert restored.step == 30
        assert torch.equal(saved["weight"], restored.state["model"]["weight"])
        assert manager.best is not None
        assert manager.best.step == 20
    plain = torch.load(Path(folder, "last.ckpt"), weights_only=True)
    assert torch.equal(saved["weight"], plain["model"]["weight"])


if __name__ == "__main__":
    main()
