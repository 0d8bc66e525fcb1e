"""A sample of the zoo; `python -m tests.zoo` makes all of it."""

import json

import pytest
import torch
from support import ROOT
from torch import nn

from zoo import cells
from zoo.case import Case
from zoo.page import page
from zoo.zoo import cases

SAMPLE = ("transformers qwen2_moe", "transformers vit", "timm beit_base_patch16_224", "torchvision squeezenet")


@pytest.fixture(scope="module")
def every():
    return cases()


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_every_method_works_on_a_sample(every, name):
    row = cells.row(every[name])
    assert {method: cell.note for method, cell in row.items() if not cell.works} == {}
    if "beit" in name:  # whose blocks read the weight of qkv
        assert all("blocks.*.attn.qkv are not called" in row[method].note for method in ("LoRA-XS", "LTE"))


def test_the_check_finds_what_is_not_trained_and_what_should_not_be():
    model = nn.Linear(2, 2)
    before = cells._copies(model)
    with torch.no_grad():
        model.weight.add_(1)
    cells._check_changes(model, before, [model.weight], lambda name: False)
    with pytest.raises(cells.Fault, match=r"bias is said to be trained and has not changed, without a word"):
        cells._check_changes(model, before, model.parameters(), lambda name: False)
    with pytest.raises(cells.Fault, match=r"weight has changed, and is not among what is trained"):
        cells._check_changes(model, before, [], lambda name: False)
    cells._check_changes(model, before, model.parameters(), lambda name: name == "bias")


def test_a_method_that_fails_is_a_sentence_in_its_cell(monkeypatch):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            raise RuntimeError("no such thing\nand more")

    found = cells.row(Case(Broken, lambda model: {"x": torch.randn(4, 3)}))
    assert {(c.works, c.note) for c in found.values()} == {(False, "RuntimeError: no such thing")}


def test_the_committed_table_has_no_silent_cell_and_is_the_page(every):
    found = json.loads((ROOT / "benchmarks" / "results" / "zoo.json").read_text())
    rows = found["rows"]
    assert {row["model"] for row in rows} <= set(every)
    assert found["models"] == len(every) >= 200
    for row in rows:
        assert set(row["cells"]) == set(cells.METHODS)
        assert all(cell["works"] or cell["note"] for cell in row["cells"].values()), row["model"]
    assert (ROOT / "docs" / "models.md").read_text() == page(rows, found["models"])
