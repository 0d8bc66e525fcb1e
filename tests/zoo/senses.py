"""transformers' models of pictures, sounds and several things at once, by tiny random configurations."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForSpeechSeq2Seq

from .case import BATCH, CLASSES, Case
from .language import SIZES, VOCABULARY, configured

SIDE = 32
PICTURES: dict[str, Any] = {
    **SIZES, "image_size": SIDE, "patch_size": 8, "num_channels": 3, "projection_dim": 16,
}  # fmt: skip
STAGES = {"depths": [1, 1], "embed_dim": 16, "num_heads": [2, 2], "window_size": 4, "patch_size": 4}
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "beit": {}, "bit": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "num_groups": 2},
    "clip": {"vision_config": PICTURES},
    "convnext": {"depths": [1, 1], "hidden_sizes": [16, 32], "num_stages": 2, "patch_size": 4},
    "convnextv2": {"depths": [1, 1], "hidden_sizes": [16, 32], "num_stages": 2, "patch_size": 4},
    "cvt": {"embed_dim": [16, 32, 32], "depth": [1, 2, 3], "num_heads": [1, 2, 2], "patch_sizes": [7, 3, 3]},
    "data2vec-vision": {}, "deit": {"architectures": ["DeiTForImageClassification"]},
    "dinov2": {}, "dinov2_with_registers": {},
    "efficientnet": {"image_size": SIDE, "width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128},
    "focalnet": {"embed_dim": 16, "depths": [1, 1], "hidden_sizes": [16, 32], "focal_levels": [2, 2],
                 "focal_windows": [3, 3], "patch_size": 4},
    "hgnet_v2": {"hidden_sizes": [16, 32], "depths": [1, 1], "embedding_size": 16, "stem_channels": [3, 8, 16],
                 "stage_in_channels": [16, 16], "stage_mid_channels": [8, 8], "stage_out_channels": [16, 32],
                 "stage_num_blocks": [1, 1], "stage_downsample": [False, True], "stage_light_block": [False, True],
                 "stage_kernel_size": [3, 3], "stage_numb_of_layers": [2, 2]},
    "hiera": {"patch_size": [7, 7],
              "image_size": [32, 32], "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "query_stride": [2, 2],
              "num_query_pool": 1, "masked_unit_size": [4, 4], "masked_unit_attention": [True, False]},
    "ijepa": {}, "imagegpt": {"vocab_size": 17, "n_positions": 16},
    "levit": {"architectures": ["LevitForImageClassification"],
              "hidden_sizes": [16, 32, 32], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1],
              "key_dim": [8, 8, 8], "patch_size": 16, "image_size": 64},
    "mobilenet_v1": {"depth_multiplier": 0.25}, "mobilenet_v2": {"depth_multiplier": 0.25},
    "mobilevit": {"hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 8, 16, 16, 16, 32], "patch_size": 2,
                  "image_size": 64},
    "mobilevitv2": {"patch_size": 2, "width_multiplier": 0.25, "image_size": 64}, "poolformer": {
        "hidden_sizes": [16, 32], "depths": [1, 1], "num_encoder_blocks": 2, "patch_sizes": [7, 3], "strides": [4, 2],
        "padding": [2, 1]},
    "pvt": {"hidden_sizes": [16, 16, 16, 32], "depths": [1, 1, 1, 1], "patch_sizes": [4, 2, 2, 2], "image_size": 64,
            "num_attention_heads": [1, 2, 2, 2], "mlp_ratios": [2, 2, 2, 2]},
    "pvt_v2": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_encoder_blocks": 2, "patch_sizes": [7, 3],
               "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "sr_ratios": [4, 2]},
    "regnet": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "groups_width": 8},
    "resnet": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]},
    "segformer": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_encoder_blocks": 2, "patch_sizes": [7, 3],
                  "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "sr_ratios": [4, 2]},
    "siglip": {"vision_config": PICTURES},
    "swiftformer": {"depths": [1, 1], "embed_dims": [16, 32], "downsamples": [True, True],
                    "mlp_ratio": 2},
    "swin": STAGES, "swinv2": STAGES, "vit": {}, "vit_msn": {},
}  # fmt: skip
EYES: dict[str, dict[str, Any]] = {
    "aimv2_vision_model": {}, "clip_vision_model": {}, "dinov3_vit": {}, "pixio": {}, "siglip_vision_model": {},
    "vit_mae": {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
                "decoder_intermediate_size": 16}, "yolos": {"image_size": [32, 32]},
}  # fmt: skip
EARS: dict[str, dict[str, Any]] = {
    family: {
        "conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False,
    }
    for family in ("data2vec-audio", "hubert", "sew", "unispeech", "unispeech-sat", "wav2vec2",
                   "wav2vec2-conformer", "wavlm")
}  # fmt: skip
PAIRS: dict[str, dict[str, Any]] = {
    family: {"text_config": SIZES, "vision_config": PICTURES,
             "projection_dim": 16}
    for family in ("chinese_clip", "clip", "siglip")
}  # fmt: skip


def cases() -> dict[str, Case]:
    """Case by family."""
    found = {}
    for family, own in CLASSIFIERS.items():
        batch = _colours if family == "imagegpt" else _pictures_and_labels
        found[f"{family} (pictures)" if family in PAIRS else family] = Case(
            _maker(AutoModelForImageClassification, family, {"num_labels": CLASSES, **own}), batch
        )
    found |= {family: Case(_maker(AutoModel, family, own), _pictures) for family, own in EYES.items()}
    found |= {family: Case(_maker(AutoModel, family, own), _sounds) for family, own in EARS.items()}
    found |= {family: Case(_maker(AutoModel, family, own), _pairs) for family, own in PAIRS.items()}
    listening = {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}
    found["whisper"] = Case(_maker(AutoModelForSpeechSeq2Seq, "whisper", listening), _spectra_and_labels)
    listening = {**listening, "input_feat_per_channel": 8, "conv_channels": 16, "max_source_positions": 64}
    found["speech_to_text"] = Case(_maker(AutoModelForSpeechSeq2Seq, "speech_to_text", listening), _long_spectra)
    spectrogram = {"num_mel_bins": 16, "max_length": 32, "patch_size": 8, "frequency_stride": 8, "time_stride": 8}
    found["audio-spectrogram-transformer"] = Case(
        _maker(AutoModel, "audio-spectrogram-transformer", spectrogram), _spectrogram
    )
    return found


def _maker(auto: Any, family: str, own: dict[str, Any]) -> Callable[[], nn.Module]:
    return lambda: auto.from_config(configured(family, PICTURES, own))


def _side(model: nn.Module) -> int:
    size = getattr(model.config, "image_size", SIDE)
    return size if isinstance(size, int) else SIDE


def _pictures(model: nn.Module) -> dict[str, Any]:
    side = _side(model)
    made = {"pixel_values": torch.randn(BATCH, 3, side, side)}
    if model.config.model_type == "vit_mae":  # which patches it masks is drawn at each call
        made["noise"] = torch.rand(BATCH, (side // model.config.patch_size) ** 2)
    return made


def _pictures_and_labels(model: nn.Module) -> dict[str, Any]:
    side = SIDE if model.config.model_type in ("resnet", "regnet") else _side(model)
    return {"pixel_values": torch.randn(BATCH, 3, side, side), "labels": torch.arange(BATCH) % CLASSES}


def _colours(model: nn.Module) -> dict[str, Any]:
    return {"input_ids": torch.randint(0, 16, (BATCH, 16)), "labels": torch.arange(BATCH) % CLASSES}


def _sounds(model: nn.Module) -> dict[str, Any]:
    return {"input_values": torch.randn(BATCH, 400)}


def _spectra_and_labels(model: nn.Module) -> dict[str, Any]:
    return {"input_features": torch.randn(BATCH, 8, 32), "labels": torch.randint(3, VOCABULARY, (BATCH, 8))}


def _long_spectra(model: nn.Module) -> dict[str, Any]:
    return {"input_features": torch.randn(BATCH, 32, 8), "labels": torch.randint(3, VOCABULARY, (BATCH, 8))}


def _spectrogram(model: nn.Module) -> dict[str, Any]:
    return {"input_values": torch.randn(BATCH, 32, 16)}


def _pairs(model: nn.Module) -> dict[str, Any]:
    tokens = torch.randint(3, VOCABULARY, (BATCH, 8))
    tokens[:, -1] = VOCABULARY - 1
    return {"input_ids": tokens, "pixel_values": torch.randn(BATCH, 3, SIDE, SIDE), "return_loss": True}
