#!/usr/bin/env bash
# torchmetrics 1.9.0: persistent(True) puts the state of a metric into its state_dict(). A MetricCollection passes the call on to
# its metrics; wrappers do not: after MinMaxMetric(metric).persistent(True) the state_dict() is empty, and so it is for
# MultioutputWrapper. load_state_dict takes the empty state without an error, so a resumed training measures its extremes, and
# the metric within, from the resume on.
# Seen:
#   MeanMetric: ['mean_value', 'weight']
#   MetricCollection: ['MeanMetric.mean_value', 'MeanMetric.weight']
#   MinMaxMetric: []
#   MultioutputWrapper: []
#   largest of 5.0 and 1.0: 5.0, resumed before the second: 1.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 torchmetrics==1.9.0
cd "$folder"
cat >shown.py <<'PY'
import torch
from torchmetrics import MeanMetric, MetricCollection, MinMaxMetric
from torchmetrics.wrappers import MultioutputWrapper

seen = []
for metric in (
    MeanMetric(),
    MetricCollection([MeanMetric()]),
    MinMaxMetric(MeanMetric()),
    MultioutputWrapper(MeanMetric(), 2),
):
    metric.persistent(True)
    metric.update(torch.ones(3, 2))
    seen.append(list(metric.state_dict()))
    print(f"{type(metric).__name__}: {seen[-1]}")


def largest(is_resumed):
    metric = MinMaxMetric(MeanMetric())
    metric.persistent(True)
    metric(torch.tensor(5.0))
    if is_resumed:
        state, metric = metric.state_dict(), MinMaxMetric(MeanMetric())
        metric.persistent(True)
        metric.load_state_dict(state)
    return metric(torch.tensor(1.0))["max"].item()


both = largest(False), largest(True)
print("largest of 5.0 and 1.0: {}, resumed before the second: {}".format(*both))
assert all(seen[:2]) and not any(seen[2:]) and both == (5.0, 1.0), "the behaviour has changed"
PY
venv/bin/python -W ignore shown.py
