"""How far is ``plan`` from a real step? Six combinations of models of six kinds, each beside its prediction.

    nice -n 10 python benchmarks/prediction_error.py            # all, each model in a process of its own, on one thread
    python benchmarks/prediction_error.py --models llama-mini t5-mini --out benchmarks/results/SOME.json

Two real steps of each in float32 on the CPU, below 4 GiB; the peak is the most that live tensors hold. Models that the
result has with the installed versions are not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROWS = 2
TOKENS = 64
CATEGORIES = ("weights", "gradients", "optimizer", "activations")
COMBINATIONS = (
    "full+all+adamw", "lora+backrazor+adamw", "full+all+galore-adamw", "full+checkpoint+sgd", "lora-xs+all+adamw",
    "lte+all+adamw",
)  # fmt: skip
LANGUAGE = {"vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}
GATED = {**LANGUAGE, "num_key_value_heads": 2, "intermediate_size": 688, "max_position_embeddings": 512}
EXPERTS = {**GATED, "num_hidden_layers": 4, "num_experts_per_tok": 2}
# kind -> a name that plan knows (of timm too), or a name of its own with (model_type, configuration, task)
MODELS: dict[str, list[str | tuple[str, str, dict[str, Any], str]]] = {
    "CNN": ["resnet20", "resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "convnext_atto", "regnetx_002"],
    "ViT": [
        "google/vit-base-patch16-224", "facebook/deit-tiny-patch16-224", "facebook/deit-small-patch16-224",
        "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s32_224",
    ],
    "encoder": [
        "google-bert/bert-base-uncased", "google/bert_uncased_L-2_H-128_A-2", "google/bert_uncased_L-4_H-256_A-4",
        "google/bert_uncased_L-8_H-512_A-8", "distilbert/distilroberta-base",
        ("electra-mini", "electra", {**LANGUAGE, "embedding_size": 128, "intermediate_size": 1024}, "text"),
    ],
    "decoder": [
        "openai-community/gpt2", "distilbert/distilgpt2", "HuggingFaceTB/SmolLM-135M",
        ("llama-mini", "llama", GATED, "language"),
        ("mistral-mini", "mistral", GATED, "language"),
        ("qwen3-mini", "qwen3", {**GATED, "head_dim": 64}, "language"),
        ("opt-mini", "opt", {**LANGUAGE, "ffn_dim": 1024, "word_embed_proj_dim": 256}, "language"),
        ("pythia-mini", "gpt_neox", {**LANGUAGE, "intermediate_size": 1024}, "language"),
        ("phi-mini", "phi", {**LANGUAGE, "intermediate_size": 1024}, "language"),
    ],
    "encoder-decoder": [
        ("t5-mini", "t5", {"vocab_size": 8192, "decoder_start_token_id": 0, "d_model": 256, "d_kv": 64, "d_ff": 1024,
                           "num_layers": 4, "num_decoder_layers": 4, "num_heads": 4}, "pairs"),
        ("bart-mini", "bart", {"vocab_size": 8192, "d_model": 256, "encoder_layers": 4, "decoder_layers": 4,
                               "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 1024,
                               "decoder_ffn_dim": 1024, "max_position_embeddings": 256}, "pairs"),
    ],
    "mixture of experts": [
        ("mixtral-mini", "mixtral", {**EXPERTS, "num_local_experts": 4}, "language"),
        ("qwen2-moe-mini", "qwen2_moe", {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 352,
                                         "shared_expert_intermediate_size": 688}, "language"),
    ],
}  # fmt: skip


def name_of(model: str | tuple[str, str, dict[str, Any], str]) -> str:
    return model if isinstance(model, str) else model[0]


def measure_model(name: str) -> list[dict[str, Any]]:
    """Predicted and measured bytes of every combination, or why it is refused."""
    import torch
    from memtrain_apps.compose.axes import Axes
    from memtrain_apps.plan.forecast import Workplace, predict_arm
    from memtrain_apps.plan.measuring import measure_place
    from memtrain_apps.plan.shapes import Shape, find_shape
    from memtrain_apps.plan.uses import Step
    from memtrain_common.commands.quiet import quiet_libraries
    from memtrain_common.errors import UserError

    quiet_libraries()
    torch.set_num_threads(1)
    (model,) = (m for models in MODELS.values() for m in models if name_of(m) == name)
    shape = find_shape(model) if isinstance(model, str) else Shape(*model)  # type: ignore[arg-type]
    step = Step(shape, 0 if shape.task == "pictures" else TOKENS, cuda=False)
    arms: list[dict[str, Any]] = []
    for name_of_arm in COMBINATIONS:
        train, save, optim = name_of_arm.split("+")
        axes = Axes(train, save, optim, heads=2)  # type: ignore[arg-type]
        place = Workplace(step, rows=ROWS)
        arm: dict[str, Any] = {"train": train, "save": save, "optim": optim}
        try:
            began = time.process_time()
            found = predict_arm(place, axes)
            arm["predicting_seconds"] = round(time.process_time() - began, 2)
            ledger, peak = measure_place(place, axes, torch.device("cpu"))
        except UserError as error:
            arms.append({**arm, "refused": str(error)})
            continue
        predicted = {**{c: found.ledger[c] for c in CATEGORIES}, "peak": found.peak}
        measured = {**{c: ledger[c] for c in CATEGORIES}, "peak": peak}
        errors = {c: round(predicted[c] / measured[c] - 1, 6) if measured[c] else None for c in predicted}
        arms.append({**arm, "predicted": predicted, "measured": measured, "error": errors})
        print(name, axes.name, errors, file=sys.stderr, flush=True)
    return arms


def summary(models: dict[str, Any]) -> dict[str, Any]:
    """Median and worst of the absolute error over every measured arm, by category, and whose the worst is."""
    out: dict[str, Any] = {"models": len(models)}
    for category in (*CATEGORIES, "peak"):
        errors = [
            (abs(arm["error"][category]), f"{name} {arm['train']}+{arm['save']}+{arm['optim']}")
            for name, model in models.items()
            for arm in model["arms"]
            if arm.get("error") and arm["error"][category] is not None
        ]
        if errors:
            worst = max(errors)
            out[category] = {
                "median": statistics.median(e for e, _ in errors), "worst": worst[0], "worst_of": worst[1],
                "arms": len(errors),
            }  # fmt: skip
    return out


def main() -> None:
    """Measure every model that is not there yet, and write ``results/prediction_error.json`` after each."""
    from memtrain_common.measuring.environment import versions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one model, printed as JSON")
    parser.add_argument("--models", nargs="+", default=[name_of(m) for models in MODELS.values() for m in models])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "prediction_error.json")
    flags = parser.parse_args()
    if flags.only:
        print(json.dumps(measure_model(flags.only)))
        return
    before = json.loads(flags.out.read_text()) if flags.out.exists() else {}
    models = before["models"] if before.get("versions") == versions() and "summary" in before else {}
    kinds = {name_of(m): kind for kind, found in MODELS.items() for m in found}
    for name in flags.models:
        if name in models:
            continue
        done = subprocess.run([sys.executable, __file__, "--only", name], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{name} failed", flush=True)
            continue
        arms = json.loads(done.stdout.splitlines()[-1])
        measured = [a for a in arms if "error" in a]
        largest = {
            c: max((abs(a["error"][c]) for a in measured if a["error"][c] is not None), default=0.0)
            for c in (*CATEGORIES, "peak")
        }
        models[name] = {
            "kind": kinds[name], "rows": ROWS, "largest_error": largest, "measured_arms": len(measured), "arms": arms,
        }  # fmt: skip
        print(name, largest, flush=True)
        write(flags.out, models)
    write(flags.out, models)


def write(path: Path, models: dict[str, Any]) -> None:
    """What is measured so far."""
    import torch
    from memtrain_common.measuring.bench import write_results

    write_results(
        path, argv=["python", "benchmarks/prediction_error.py", *sys.argv[1:]], device=torch.device("cpu"), seeds=[0],
        tokens=TOKENS, summary=summary(models), models=models,
    )  # fmt: skip


if __name__ == "__main__":
    main()
