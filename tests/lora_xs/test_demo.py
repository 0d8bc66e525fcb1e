"""lora-xs demo, shortened: every method is trained, and what the table says is so."""

import json

import pytest
from support import run_command


@pytest.mark.slow
def test_every_method_stands_in_the_table(tmp_path):
    words = ["lora-xs", "demo", "--ranks", "2", "8", "--seeds", "1", "--pretrain-steps", "30", "--steps", "12"]
    done = run_command([*words, "--out", "demo.json"], tmp_path)
    assert done.returncode == 0, done.stderr
    arms = {arm["name"]: arm for arm in json.loads((tmp_path / "demo.json").read_text())["arms"]}
    assert list(arms) == ["head alone", "LoRA-XS r=2", "LoRA-XS r=8", "LoRA r=4", "full"]
    # 3 layers of 4 projections of 64×64 and two of 64×128
    assert [arms[f"LoRA-XS r={r}"]["trained"] for r in (2, 8)] == [18 * 4, 18 * 64]
    assert arms["LoRA r=4"]["trained"] == 3 * 4 * (4 * 128 + 2 * 192)
    assert arms["head alone"]["trained"] == 0
    assert all(arm["head"] == 325 for arm in arms.values())
    sizes = [arm["saved_bytes"] for arm in arms.values()]
    assert sizes == sorted(sizes)
    memory = {n: sum(a["memory_bytes"][c] for c in ("gradients", "optimizer", "activations")) for n, a in arms.items()}
    assert memory["LoRA-XS r=8"] < memory["LoRA r=4"] < memory["full"]
    for name in arms:
        assert f"\n  {name} " in done.stdout
    assert "Warning" not in done.stderr
