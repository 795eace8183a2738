#!/usr/bin/env bash
# coqui-tts-trainer 0.4.0: best_model_STEP.pth is the model with the lowest loss of the evaluations. A resume (continue_path) takes the loss to
# beat from the newest checkpoint instead of the best model, though it logs the name of the best one. A checkpoint that is saved before the
# evaluation of its epoch has none: then the loss of the training counts. So the first epoch after the resume with a lower loss
# of the training becomes the best model, and the better one is removed.
# Seen (losses of the evaluations 0.5 0.2 0.4 0.3 0.35, ended within epoch 3):
#   unbroken: best_model_6.pth, 0.20
#   before the resume: best_model_6.pth, 0.20
#   after it: best_model_17.pth, 0.35
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 coqui-tts-trainer==0.4.0
cd "$folder"
cat >shown.py <<'PY'
from dataclasses import dataclass
from pathlib import Path

import torch
from trainer import Trainer, TrainerArgs, TrainerConfig, TrainerModel

EVALUATIONS = [0.5, 0.2, 0.4, 0.3, 0.35]
TRAININGS = [1.0, 0.9, 0.8, 0.7, 0.6]


class Killed(BaseException):
    """Stands for the end of the process."""


@dataclass
class Config(TrainerConfig):
    epochs: int = 5
    run_name: str = "run"
    save_step: int = 2
    save_n_checkpoints: int = 1
    test_delay_epochs: int = 100


class Model(TrainerModel):
    def __init__(self, steps):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.steps = steps

    def forward(self, x):
        return self.layer(x)

    def train_step(self, batch, criterion):
        self.steps -= 1
        if self.steps < 0:
            raise Killed
        output = self.layer(batch["x"])
        return {"output": output}, {"loss": output.mean() * 0 + TRAININGS[self.trainer[0].epochs_done]}

    def eval_step(self, batch, criterion):
        return {"output": batch}, {"loss": torch.tensor(EVALUATIONS[self.trainer[0].epochs_done])}

    def get_criterion(self):
        return torch.nn.MSELoss()

    def get_optimizer(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def get_scheduler(self, optimizer):
        return None

    def get_data_loader(self, *args, **kwargs):
        return torch.utils.data.DataLoader([{"x": torch.ones(1)}] * 12, batch_size=4)


def run(text, steps, folder, **args):
    model = Model(steps)
    trainer = Trainer(
        TrainerArgs(**args),
        Config(output_path=folder),
        folder,
        model=model,
        train_samples=[0],
        eval_samples=[0],
        parse_command_line_args=False,
    )
    model.trainer = [trainer]
    try:
        trainer._fit()
    except Killed:
        pass
    (best,) = Path(trainer.output_path).glob("best_model_*.pth")
    loss = torch.load(best)["model_loss"]["eval_loss"]
    print(f"\nSHOWN {text}: {best.name}, {loss:.2f}")
    return str(trainer.output_path), best.name


assert run("unbroken", 15, "a")[1] == "best_model_6.pth"
folder, before = run("before the resume", 11, "b")
after = run("after it", 15, "b", continue_path=folder)[1]
assert (before, after) == ("best_model_6.pth", "best_model_17.pth"), "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py 2>&1 | grep "^SHOWN\|Error" | sed "s/^SHOWN //"
