#!/usr/bin/env bash
# opacus 1.6.0: PrivacyEngine.save_checkpoint takes a noise_scheduler and a grad_clip_scheduler, and saves how many epochs they have
# counted. What they have made of the noise and of the clipping bound are attributes of the DPOptimizer, which are in no state_dict().
# So load_checkpoint restores the schedules, and the noise begins with its first value again: with a noise that grows, the rest of the
# training is less private than planned. The bound that clipping="adaptive" has learned begins anew too. No warning.
# Seen (saved after epoch 3):
#   ExponentialNoise, unbroken: 1.25 1.562 1.953 2.441 3.052 3.815
#   resumed after epoch 3:      1.25 1.562 1.953
#   adaptive bound: 4.491 at the save, 1.0 after the load
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 opacus==1.6.0
cd "$folder"
cat >shown.py <<'PY'
import torch
from opacus import PrivacyEngine
from opacus.schedulers import ExponentialNoise
from torch.utils.data import DataLoader, TensorDataset

ADAPTIVE = {
    "clipping": "adaptive",
    "target_unclipped_quantile": 0.5,
    "clipbound_learning_rate": 0.5,
    "max_clipbound": 10.0,
    "min_clipbound": 0.01,
    "unclipped_num_std": 2.0,
}


def made(**clipping):
    torch.manual_seed(0)
    model, data = torch.nn.Linear(4, 1), torch.randn(64, 4)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(data, data.sum(1, keepdim=True)), batch_size=16),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        **clipping,
    )
    return engine, loader, {"module": model, "optimizer": optimizer}


def train(loader, objects, schedule=None):
    for x, y in loader:
        objects["optimizer"].zero_grad()
        (objects["module"](x) - y).pow(2).mean().backward()
        objects["optimizer"].step()
    if schedule:
        schedule.step()


def scheduled():
    engine, loader, objects = made()
    return engine, loader, objects, ExponentialNoise(objects["optimizer"], gamma=1.25)


def noises(loader, objects, schedule, epochs):
    seen = []
    for _ in range(epochs):
        train(loader, objects, schedule)
        seen.append(round(objects["optimizer"].noise_multiplier, 3))
    return seen


unbroken = noises(*scheduled()[1:], 6)
print("ExponentialNoise, unbroken:", *unbroken)
engine, loader, objects, schedule = scheduled()
noises(loader, objects, schedule, 3)
engine.save_checkpoint(path="noise.pt", noise_scheduler=schedule, **objects)
engine, loader, objects, schedule = scheduled()
engine.load_checkpoint(path="noise.pt", noise_scheduler=schedule, **objects)
assert schedule.last_epoch == 3, "the schedule was restored"
resumed = noises(loader, objects, schedule, 3)
print("resumed after epoch 3:     ", *resumed)
assert resumed == unbroken[:3], "the behaviour has changed"

engine, loader, objects = made(**ADAPTIVE)
for _ in range(3):
    train(loader, objects)
engine.save_checkpoint(path="bound.pt", **objects)
saved = round(float(objects["optimizer"].max_grad_norm), 3)
engine, loader, objects = made(**ADAPTIVE)
engine.load_checkpoint(path="bound.pt", **objects)
print(f"adaptive bound: {saved} at the save, {objects['optimizer'].max_grad_norm} after the load")
assert saved != objects["optimizer"].max_grad_norm == 1.0, "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
