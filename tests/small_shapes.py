"""Small models of four families, for the tests of ``plan``: two blocks, which are counted as they are; Llama has
three."""

from memtrain_apps.plan.shapes import Shape
from memtrain_apps.plan.uses import Step

VIT = Shape("vit", "vit", {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96, "image_size": 8,
    "patch_size": 4, "num_labels": 5,
})  # fmt: skip
BERT = Shape("bert", "bert", {
    "vocab_size": 211, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96,
    "max_position_embeddings": 32, "type_vocab_size": 2, "num_labels": 2,
})  # fmt: skip
GPT2 = Shape("gpt2", "gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 211})
LLAMA = Shape("llama", "llama", {
    "vocab_size": 211, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
})  # fmt: skip
SMALL = {"vit": Step(VIT, cuda=False), **{s.name: Step(s, 13, cuda=False) for s in (BERT, GPT2, LLAMA)}}

TINY = ("--model", "vit-mini", "--batch", "64", "--classes", "10", "--reserve", "0", "--device", "cpu")
