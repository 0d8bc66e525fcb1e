#!/usr/bin/env bash
# torchmetrics 1.9.0: metrics of a MetricCollection that agree on the first batch are one metric from then on.
#
# So as to count once what several metrics share, a collection looks at their counts after its first batch: those with equal counts
# become a group, and later batches update the group's first metric alone. What the metrics were asked for is not
# looked at. Two thresholds with no score between them in the first batch, or an ignored class that is not in it, and the
# second metric reports the first one's value for good; reset() keeps the groups, so a first batch of a trial run decides for
# all epochs. The documentation says of groups that they differ "only in their compute step". compute_groups=False helps.
#
# Expected: each metric's own value, whatever the order of the batches; seen: in one order all are right, in another
# 0.64 stands for both F1 scores, where 0.64 and 0.82 are right.
set -euo pipefail
export PIP_CONFIG_FILE=/dev/null  # the versions named here, whatever this machine's own settings prefer
unset PIP_CONSTRAINT PIP_FIND_LINKS
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 torchmetrics==1.9.0 numpy
cat > "$folder/seen.py" <<'PYTHON'
import torch
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy

torch.manual_seed(0)


def thresholds():
    return {"low": BinaryF1Score(threshold=0.5), "high": BinaryF1Score(threshold=0.7)}


def background():
    options = dict(num_classes=5, average="micro")
    return {"all": MulticlassAccuracy(**options), "without class 0": MulticlassAccuracy(**options, ignore_index=0)}


def measured(metrics, batches, **options):
    """The values of a second epoch: the first one ended with reset()."""
    collection = MetricCollection(metrics, **options)
    for epoch in range(2):
        collection.reset()
        for batch in batches:
            collection.update(*batch)
        values = collection.compute()
    return {name: round(value.item(), 4) for name, value in values.items()}


def scores(sure):
    """Noisy scores of 32 samples, all of them under 0.3 or over 0.8 if sure."""
    truth = torch.randint(2, (32,))
    noisy = (0.5 + 0.3 * (truth - 0.5) + 0.2 * torch.randn(32)).clamp(0, 1)
    return (torch.where(noisy > 0.5, 0.9, 0.1) if sure else noisy), truth


def classes(least):
    truth = torch.randint(least, 5, (32,))
    return torch.where(torch.rand(32) < 0.3, torch.randint(least, 5, (32,)), truth), truth


for make, batches in (
    (thresholds, [scores(sure=True), *(scores(sure=False) for _ in range(9))]),
    (background, [classes(1), *(classes(0) for _ in range(9))]),
):
    own = measured(make(), batches, compute_groups=False)
    turned = measured(make(), batches[::-1])
    joined = measured(make(), batches)
    print(f"each on its own {own}; together, batches in reverse order {turned}; together {joined}")
    assert turned == own
    first, second = joined.values()
    assert first == second == list(own.values())[0] != list(own.values())[1]
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/seen.py"
