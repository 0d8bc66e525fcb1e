"""Which rows are longer than a model has positions for: what is said is held to what the model does."""

import pytest
import torch
from memtrain_common.errors import UserError
from memtrain_common.models.encoders import check_length
from memtrain_common.models.shaped import Wanted, shaped

transformers = pytest.importorskip("transformers")
OLD = {"n_positions": 20, "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 30}
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 30}
LEARNED = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(max_position_embeddings=20, **SMALL)),
    "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(max_position_embeddings=20, **SMALL)),
    "mpnet": lambda: transformers.MPNetModel(transformers.MPNetConfig(max_position_embeddings=20, **SMALL)),
    "openai-gpt": lambda: transformers.OpenAIGPTModel(transformers.OpenAIGPTConfig(**OLD)),
    "gptj": lambda: transformers.GPTJModel(transformers.GPTJConfig(rotary_dim=4, n_inner=16, **OLD)),
    "ibert": lambda: transformers.IBertModel(transformers.IBertConfig(max_position_embeddings=20, **SMALL)),
    "gpt2": lambda: transformers.GPT2Model(
        transformers.GPT2Config(n_positions=20, n_embd=16, n_layer=1, n_head=2, vocab_size=30)
    ),
    "opt": lambda: transformers.OPTModel(
        transformers.OPTConfig(
            max_position_embeddings=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16,
            vocab_size=30, word_embed_proj_dim=16,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", LEARNED)
def test_the_most_tokens_are_those_that_the_model_takes(family):
    model = LEARNED[family]().eval()

    def runs(tokens):
        try:
            model(input_ids=torch.full((1, tokens), 7))
        except (IndexError, RuntimeError):
            return False
        return True

    most = max(n for n in range(15, 25) if runs(n))
    assert check_length(model, "it", most, 99) == ""
    with pytest.raises(UserError, match=f"a row of {most + 1} tokens through, more than the {most} positions of it"):
        check_length(model, "it", most + 1, 99)


def test_rotary_positions_have_no_end_and_it_is_said():
    config = transformers.LlamaConfig(max_position_embeddings=20, num_key_value_heads=2, **SMALL)
    model = transformers.LlamaModel(config)
    assert check_length(model, "it", 20, 99) == ""
    said = check_length(model, "it", 21, 99)
    assert said == "rows of up to 21 tokens are longer than the 20 positions that it was made for"


SHAPES = {
    "bert": ("BertConfig", {}, 20),
    "roberta": ("RobertaConfig", {}, 18),
    "xlm-roberta": ("XLMRobertaConfig", {}, 18),
    "camembert": ("CamembertConfig", {}, 18),
    "mpnet": ("MPNetConfig", {}, 18),
    "longformer": ("LongformerConfig", {"attention_window": 6}, 18),
    "opt": ("OPTConfig", {"ffn_dim": 16, "word_embed_proj_dim": 16, "architectures": ["OPTForCausalLM"]}, 20),
    "gpt2": ("GPT2Config", {**OLD, "architectures": ["GPT2LMHeadModel"]}, 20),
    "llama": ("LlamaConfig", {"num_key_value_heads": 2, "architectures": ["LlamaForCausalLM"]}, 20),
}


@pytest.mark.parametrize("family", SHAPES)
def test_a_folder_by_its_shape_takes_no_more_tokens_than_its_model(family, tmp_path):
    """Where the first positions are the padding's, config.json counts them too."""
    kind, more, most = SHAPES[family]
    sizes = {} if family == "gpt2" else {"max_position_embeddings": 20, **SMALL}
    getattr(transformers, kind)(**sizes, **more).save_pretrained(tmp_path)

    def loss_of(tokens):
        model = shaped(Wanted(str(tmp_path), batch_size=1, sequence_length=tokens, classes=2))
        return model.loss(model.build())

    assert loss_of(most).isfinite()
    with pytest.raises(UserError, match=f"--sequence-length {most + 1} is beyond the {most} positions"):
        loss_of(most + 1)
