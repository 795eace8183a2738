"""Makes the files in the folder beside it with the programs that people train with. CI only reads them.

Run it anew with ``python tests/formats/foreign/make.py`` where these are installed (Python 3.11, the last five without
their dependencies): torch 2.13.0, safetensors 0.8.0, skorch 1.4.0, mmengine-lite 0.10.7, opencv-python-headless
5.0.0.93, timm 1.0.31, torchvision 0.28.0, speechbrain 1.1.2, ultralytics 8.4.190.

``expected.json`` says what each model's own ``state_dict`` was: name, shape, and the sum of the elements.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import nn

HERE = Path(__file__).parent / "files"


def net() -> nn.Sequential:
    """Return the model that most of them train; `test_foreign.py` makes it too."""
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def stub_torchvision() -> None:
    """Let torchvision be imported where its compiled part does not fit this build of torch; nothing here runs it."""
    operators = ("nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
    for name in (*operators, *(f"_{operator}_backward" for operator in operators[2:])):
        torch.library.define(f"torchvision::{name}", "(Tensor x) -> Tensor")


def make_skorch(folder: Path) -> dict[str, Any]:
    """A checkpoint that holds safetensors in ``params.pt``, beside the optimizer's state."""
    import numpy as np
    from skorch import NeuralNetClassifier
    from skorch.callbacks import Checkpoint

    inputs, labels = np.random.randn(16, 4).astype("float32"), np.array([0, 1] * 8)
    saver = Checkpoint(monitor=None, dirname=str(folder), use_safetensors=True, f_optimizer=None, f_criterion=None)
    classifier = NeuralNetClassifier(
        net(), criterion=nn.CrossEntropyLoss, max_epochs=1, callbacks=[saver], verbose=0, train_split=None
    )
    classifier.fit(inputs, labels)
    return {"params.pt": classifier.module_.state_dict()}


def make_timm(folder: Path) -> dict[str, Any]:
    """A checkpoint with the command line's arguments and an average beside the model."""
    stub_torchvision()
    from timm.utils import CheckpointSaver, ModelEmaV3

    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    average = ModelEmaV3(model, decay=0.5)
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    average.update(model)
    args = argparse.Namespace(model="net", lr=0.1, when=datetime.timedelta(1))
    saver = CheckpointSaver(model, optimizer, args, average, checkpoint_dir=str(folder), recovery_dir=str(folder))
    saver.save_checkpoint(3, metric=0.5)
    for path in folder.iterdir():
        if path.name != "last.pth.tar":
            path.unlink()
    return {"last.pth.tar: state_dict": model.state_dict(), "last.pth.tar: state_dict_ema": average.module.state_dict()}


def make_mmengine(folder: Path) -> dict[str, Any]:
    """A checkpoint with the message hub: history buffers and numpy scalars."""
    stub_torchvision()
    from mmengine.model import BaseModel
    from mmengine.runner import Runner
    from torch.utils.data import DataLoader

    class Task(BaseModel):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, *inputs: Any, mode: str = "loss") -> Any:
            return {"loss": self.net(torch.stack(inputs)).square().mean()}

    model = Task()
    runner = Runner(
        model,
        work_dir="/tmp/run",  # It is written into the file.
        train_dataloader=DataLoader([torch.randn(4) for _ in range(8)], batch_size=4, collate_fn=lambda x: x),  # type: ignore[arg-type]
        train_cfg={"by_epoch": True, "max_epochs": 1},
        optim_wrapper={"optimizer": torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)},
        default_hooks={"logger": {"type": "LoggerHook", "interval": 1}},
        log_level="ERROR",
    )
    runner.train()
    shutil.move("/tmp/run/epoch_1.pth", str(folder / "epoch_1.pth"))
    shutil.rmtree("/tmp/run")
    return {"epoch_1.pth": model.state_dict()}


def make_speechbrain(folder: Path) -> dict[str, Any]:
    """A folder per checkpoint: torch files and text files, all called ``.ckpt``."""
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")  # It is imported, and not used to save.
    sys.modules["torchaudio"].__version__ = "2.11.0"  # type: ignore[attr-defined]
    from speechbrain.utils.checkpoints import Checkpointer
    from speechbrain.utils.epoch_loop import EpochCounter

    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    counter = EpochCounter(3)
    counter.current = 2
    parts = {"model": model, "optimizer": optimizer, "counter": counter}
    Checkpointer(str(folder), recoverables=parts).save_checkpoint(meta={"loss": 0.5}, name="two")
    return {"CKPT+two": model.state_dict()}


def make_ultralytics(folder: Path) -> dict[str, Any]:
    """A checkpoint in which the average is a whole pickled module, in half precision."""
    from ultralytics.engine.trainer import BaseTrainer
    from ultralytics.nn.tasks import DetectionModel
    from ultralytics.utils.torch_utils import ModelEMA

    layers = [[-1, 1, "Conv", [4, 3, 2]], [-1, 1, "Conv", [4, 3, 2]], [-1, 1, "Conv", [4, 3, 2]]]
    config = {"nc": 1, "reg_max": 1, "backbone": layers, "head": [[[1, 2], 1, "Detect", ["nc"]]]}
    model = DetectionModel(config, ch=3, verbose=False)
    model.args = types.SimpleNamespace(lr0=0.01, box=7.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = types.SimpleNamespace(
        epoch=3,
        best_fitness=0.5,
        fitness=0.5,
        ema=ModelEMA(model),
        model=model,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        args=types.SimpleNamespace(lr0=0.01, save_dir="runs"),
        metrics={"fitness": 0.5},
        read_results_csv=dict,
        stopper=types.SimpleNamespace(best_fitness=0.5, best_epoch=3),
        wdir=folder,
        last=folder / "last.pt",
        best=folder / "best.pt",
        save_period=-1,
    )
    BaseTrainer.save_model(trainer)
    (folder / "best.pt").unlink()
    return {"last.pt": trainer.ema.ema.half().state_dict()}


def main() -> None:
    """Make all, or those that are named."""
    path = HERE / "expected.json"
    expected = json.loads(path.read_text()) if path.exists() else {}
    for name in sys.argv[1:] or ["skorch", "timm", "mmengine", "speechbrain", "ultralytics"]:
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        torch.manual_seed(0)
        for file, state in globals()[f"make_{name}"](folder).items():
            expected[f"{name}/{file}"] = {
                key: [[*value.shape], float(value.double().sum())] for key, value in state.items()
            }
    lines = [f"{json.dumps(file)}: {json.dumps(state)}" for file, state in sorted(expected.items())]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    os.environ["YOLO_AUTOINSTALL"] = "0"
    main()
