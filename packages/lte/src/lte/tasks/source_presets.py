"""nanoGPT's own defaults, and the configurations of nanoGPT-LTE, as presets. No torch here.

What they leave open is ours: checkpoints, float32, no ``torch.compile``; the heads' learning rate is the rest's.
Where nanoGPT-LTE runs "mhlora", all heads on all of the batch, the presets' heads are sequential; ours have their mean,
its heads their sum. ``finetune-gpt2-news`` has GPT-2's block of 1024, where nanoGPT-LTE leaves it at its default of 32.
``nanogpt-lte`` and ``nanogpt-lora`` are what those two projects' ``train.py`` begins with; of LoRA's, adapters in
attention alone and everything else frozen. The heads of ``nanogpt`` are four of rank 192, four times which is the
width; nobody has measured them.
"""

from dataclasses import replace

from .train_config import PRESETS, TrainConfig

NANOGPT = TrainConfig(
    data_dir="data/openwebtext", tokenizer="gpt2", n_layer=12, n_head=12, n_embd=768, block_size=1024,
    batch_size=12, gradient_accumulation_steps=40, max_iters=600_000, lr_decay_iters=600_000, warmup_iters=2000,
    learning_rate=6e-4, rest_learning_rate=0.0, full_learning_rate=0.0, min_lr=6e-5,
    eval_interval=2000, eval_iters=200, log_interval=1, lora_r=192, lora_alpha=768.0,
)  # fmt: skip
_NEWS = replace(
    NANOGPT, data_dir="data/cnn_dailymail", gradient_accumulation_steps=1, max_iters=401, lr_decay_iters=401,
    eval_iters=20, log_interval=20, lte_heads=4, lora_r=32, lora_alpha=128.0, lte_merge_steps=10, skip_mlp=True,
)  # fmt: skip
NANOGPT_LTE = TrainConfig(
    data_dir="data/shakespeare_char", n_layer=1, n_head=1, n_embd=64, block_size=32, batch_size=16,
    gradient_accumulation_steps=40, max_iters=1000, lr_decay_iters=600_000, warmup_iters=0, learning_rate=6e-4,
    rest_learning_rate=0.0, full_learning_rate=0.0, min_lr=6e-5, eval_interval=5, eval_iters=10, log_interval=1,
    wandb_project="Parallel-Lora", lte_heads=32, lora_r=32, lora_alpha=4096.0, lte_merge_steps=10,
    lte_mode="sequential",
)  # fmt: skip
NANOGPT_LORA = replace(
    NANOGPT, lte_heads=1, lora_r=8, lora_alpha=32.0, lte_merge_steps=0, lte_trainable=(), skip_mlp=True
)
NANOGPTS = {"nanogpt": NANOGPT, "nanogpt-lte": NANOGPT_LTE, "nanogpt-lora": NANOGPT_LORA}
SOURCE_PRESETS = {
    **PRESETS,
    **NANOGPTS,
    "gpt2-news": replace(_NEWS, block_size=512, bias=True, batch_size=8, warmup_iters=100, eval_interval=10),
    "finetune-gpt2-news": replace(
        _NEWS, init_from="gpt2", batch_size=4, warmup_iters=0, eval_interval=20, lte_merge_steps=0,
        lte_mode="sequential",
    ),
    "babygpt-news": replace(
        _NEWS, n_layer=6, n_head=6, n_embd=384, batch_size=16, gradient_accumulation_steps=40, dropout=0.2,
        max_iters=101, lr_decay_iters=101, warmup_iters=0, eval_interval=10, log_interval=10, lte_merge_steps=0,
        lte_mode="sequential",
    ),
    "shakespeare-char-lte": replace(
        NANOGPT, data_dir="data/shakespeare_char", tokenizer="chars", n_layer=6, n_head=6, n_embd=384, block_size=256,
        batch_size=64, gradient_accumulation_steps=1, dropout=0.2, learning_rate=1e-3, min_lr=1e-4, max_iters=1000,
        lr_decay_iters=1000, warmup_iters=100, beta2=0.99, eval_interval=100, eval_iters=40, lte_heads=32,
        always_save_checkpoint=False, lora_r=32, lora_alpha=4096.0, lte_merge_steps=10, skip_mlp=True,
        lte_mode="sequential",
    ),
}  # fmt: skip
