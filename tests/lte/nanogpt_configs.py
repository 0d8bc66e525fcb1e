"""Configuration files of nanoGPT, nanoGPT-LTE and nanoGPT-LoRA, by the names that they have there: values retyped."""

FILES = {
    "train_shakespeare_char": """
out_dir = 'out-shakespeare-char'
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False
wandb_log = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'
dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
""",
    "finetune_shakespeare": """
import time
out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())
dataset = 'shakespeare'
init_from = 'gpt2-xl'
always_save_checkpoint = False
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
learning_rate = 3e-5
decay_lr = False
""",
    "train_gpt2": """
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M'
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8
max_iters = 600000
lr_decay_iters = 600000
eval_interval = 1000
eval_iters = 200
log_interval = 10
weight_decay = 1e-1
""",
    "train_gpt2_news_lte": """
n_layer = 12
n_head = 12
n_embd = 768
vocab_size = 50304
block_size = 512
dropout = 0.0
bias = True
init_from = "scratch"
dataset = "cnn_dailymail"
max_iters = 401
lr_decay_iters = 401
eval_batches = 20
eval_interval = 10
log_interval = 20
batch_size = 8
gradient_accumulation_steps = 1
weight_decay = 1e-1
warmup_iters = 100
wrap_lte = True
lora_r = 32
lora_alpha = 128
lte_heads = 4
lte_mode = "dmp"
lte_merge_steps = 10
skip_mlp = True
skip_logit = True
wandb_log = True
save_checkpoint = False
""",
    "finetune_gpt2_news_lte": """
init_from = "gpt2"
dataset = "cnn_dailymail"
max_iters = 401
lr_decay_iters = 401
eval_batches = 20
eval_interval = 20
log_interval = 20
batch_size = 4
gradient_accumulation_steps = 1
weight_decay = 1e-1
wrap_lte = True
lora_r = 32
lora_alpha = 128
lte_heads = 4
lte_mode = "mhlora"
lte_merge_steps = 0
wandb_log = True
save_checkpoint = False
""",
    "train_shakespeare_char_lte": """
out_dir = 'out-shakespeare-char'
eval_interval = 100
eval_batches = 40
log_interval = 1
always_save_checkpoint = False
dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
learning_rate = 1e-3
max_iters = 1000
lr_decay_iters = 1000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
device = 'cuda'
""",
    "lora_shakespeare": """
import time
dataset = 'shakespeare'
init_from = 'gpt2'
out_dir = f'out-lora-shakespeare-{init_from}-2'
eval_interval = 5
eval_iters = 40
wandb_log = False
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())
always_save_checkpoint = False
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
learning_rate = 2e-4
decay_lr = False
device = 'cuda'
compile = False
compute_grad_memory = True
lora_rank = 8
lora_alpha = 32
lora_dropout = 0
""",
}
FILES |= {
    f"eval_{name}": f"""
batch_size = 8
eval_iters = 500
eval_only = True
wandb_log = False
init_from = '{name.replace("_", "-")}'
"""
    for name in ("gpt2", "gpt2_medium", "gpt2_large", "gpt2_xl")
}
