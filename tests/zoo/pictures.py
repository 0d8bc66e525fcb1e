"""timm's and torchvision's models: the smallest of each family, made smaller where its arguments allow it."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torchvision.models as tv
from timm import layers
from timm.models import convmixer, focalnet, metaformer, mlp_mixer
from torch import nn
from torchvision.models.vgg import VGG, make_layers

from .case import BATCH, CLASSES, Case

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
TIMM: dict[str, dict[str, Any]] = {
    "test_vit": {"img_size": 32, "patch_size": 8}, "test_vit2": {"img_size": 32, "patch_size": 8},
    "test_vit3": {"img_size": 32, "patch_size": 8}, "test_vit4": {"img_size": 32, "patch_size": 8},
    "test_vit_relpos": {"img_size": 32, "patch_size": 8}, "test_resnet": {}, "test_byobnet": {}, "test_convnext": {},
    "test_convnext2": {}, "test_convnext3": {}, "test_efficientnet": {}, "test_efficientnet_gn": {},
    "test_efficientnet_ln": {}, "test_efficientnet_evos": {}, "test_mambaout": {}, "test_nfnet": {},
    "test_coatnet": {"img_size": 64}, "test_maxvit": {"img_size": 64},
    "beit_base_patch16_224": VIT, "eva02_tiny_patch14_224": VIT, "vit_base_patch16_dinov3": VIT,
    "vit_base_patch16_rope_reg1_gap_256": VIT, "deit3_small_patch16_224": VIT, "deit_tiny_distilled_patch16_224": VIT,
    "vit_tiny_patch16_224": VIT, "flexivit_small": VIT, "samvit_base_patch16_224": VIT | {"img_size": 64},
    "cait_xxs24_224": VIT | {"depth_token_only": 1},     "xcit_nano_12_p16_224": VIT | {"img_size": 32},
    "naflexvit_base_patch16_gap": {"embed_dim": 32, "depth": 2, "num_heads": 4},
    "pit_ti_224": {"img_size": 64, "patch_size": 16, "stride": 8, "base_dims": [8, 8, 8], "depth": [1, 1, 1]},
    "tnt_s_patch16_224": {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads_outer": 4},
    "swin_tiny_patch4_window7_224": {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1),
                                     "num_heads": (2, 2)},
    "swinv2_tiny_window8_256": {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1),
                                "num_heads": (2, 2)},
    "swinv2_cr_tiny_224": {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)},
    "hiera_tiny_224": {"img_size": (64, 64), "embed_dim": 16, "stages": (1, 1), "num_heads": 1, "q_pool": 1,
                       "mask_unit_size": (4, 4), "mask_unit_attn": (True, False)},
    "davit_tiny": {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (2, 2)},
    "convnext_zepto_rms": {"depths": (1, 1, 1, 1)}, "convnextv2_atto": {"depths": (1, 1, 1, 1)},
    "twins_svt_small": {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32)},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1)}, "coat_lite_tiny": {"img_size": 64, "serial_depths": (1, 1, 1, 1)},
    "crossvit_tiny_240": {"img_size": 120}, "edgenext_xx_small": {}, "efficientformerv2_s0": {"img_size": 64},
    "efficientvit_b0": {}, "efficientvit_m0": {"img_size": 64}, "efficientvim_m1": {}, "fastvit_t8": {},
    "fasternet_t0": {}, "gcvit_xxtiny": {"img_size": 64}, "ghostnet_050": {}, "inception_next_atto": {},
    "lcnet_035": {}, "levit_128s": {"img_size": 64}, "mobilenetv3_small_050": {}, "mobilenetv4_conv_small_035": {},
    "mobileone_s0": {}, "mobilevit_xxs": {}, "mobilevitv2_050": {}, "regnetx_002": {}, "regnety_002": {},
    "repghostnet_050": {}, "repvit_m0_9": {}, "resnet10t": {}, "rexnet_100": {}, "shvit_s1": {}, "skresnet18": {},
    "starnet_s050": {}, "swiftformer_xs": {}, "tiny_vit_5m_224": {}, "visformer_tiny": {"img_size": 64},
}  # fmt: skip
MIXER = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_blocks": 2, "num_classes": CLASSES}
TIMM_CLASSES: dict[str, Callable[[], nn.Module]] = {  # whose functions by name take no sizes
    "mixer": lambda: mlp_mixer.MlpMixer(**MIXER),
    "gmlp": lambda: mlp_mixer.MlpMixer(
        **MIXER, mlp_ratio=4, block_layer=mlp_mixer.SpatialGatingBlock, mlp_layer=layers.GatedMlp
    ),
    "resmlp": lambda: mlp_mixer.MlpMixer(
        **MIXER, mlp_ratio=4, block_layer=mlp_mixer.ResBlock, norm_layer=mlp_mixer.Affine
    ),
    "convmixer": lambda: convmixer.ConvMixer(32, 2, 3, 4, num_classes=CLASSES),
    "poolformer": lambda: metaformer.MetaFormer(depths=(1, 1), dims=(16, 32), num_classes=CLASSES),
    "caformer": lambda: metaformer.MetaFormer(
        depths=(1, 1, 1, 1),
        dims=(16, 16, 32, 32),
        num_classes=CLASSES,
        token_mixers=[metaformer.SepConv, metaformer.SepConv, metaformer.Attention, metaformer.Attention],
        norm_layers=[metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2,
    ),
    "focalnet": lambda: focalnet.FocalNet(
        depths=(1, 1), embed_dim=16, focal_levels=(2, 2), focal_windows=(3, 3), num_classes=CLASSES
    ),
}
SMALL_VIT = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 48}
SMALL_SWIN = {"patch_size": [4, 4], "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": [4, 4]}
TORCHVISION: dict[str, Callable[[], nn.Module]] = {
    "alexnet": lambda: _narrow_classifier(tv.AlexNet(num_classes=CLASSES)),
    "convnext": lambda: tv.ConvNeXt(
        [tv.convnext.CNBlockConfig(16, 32, 1), tv.convnext.CNBlockConfig(32, None, 1)], num_classes=CLASSES
    ),
    "densenet": lambda: tv.DenseNet(8, (2, 2), 16, num_classes=CLASSES),
    "efficientnet_b0": lambda: tv.efficientnet_b0(num_classes=CLASSES),
    "efficientnet_v2": lambda: tv.EfficientNet(
        [tv.efficientnet.FusedMBConvConfig(1, 3, 1, 16, 16, 1), tv.efficientnet.MBConvConfig(4, 3, 2, 16, 32, 1)],
        dropout=0.1, last_channel=64, num_classes=CLASSES,
    ),
    "googlenet": lambda: tv.GoogLeNet(num_classes=CLASSES, aux_logits=False, init_weights=True),
    "maxvit": lambda: tv.MaxVit(
        (64, 64), 16, 4, [16, 32], [1, 1], 8, num_classes=CLASSES, stochastic_depth_prob=0.0
    ),
    "mnasnet": lambda: tv.MNASNet(0.35, num_classes=CLASSES),
    "mobilenet_v2": lambda: tv.MobileNetV2(CLASSES, width_mult=0.35),
    "mobilenet_v3_small": lambda: tv.mobilenet_v3_small(num_classes=CLASSES),
    "regnet": lambda: tv.regnet_y_400mf(num_classes=CLASSES),
    "resnet": lambda: tv.ResNet(tv.resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES),
    "resnext": lambda: tv.ResNet(
        tv.resnet.Bottleneck, [1, 1, 1, 1], num_classes=CLASSES, groups=8, width_per_group=4
    ),
    "shufflenet_v2": lambda: tv.shufflenet_v2_x0_5(num_classes=CLASSES),
    "squeezenet": lambda: tv.squeezenet1_1(num_classes=CLASSES),
    "swin": lambda: tv.SwinTransformer(**SMALL_SWIN, num_classes=CLASSES),
    "swin_v2": lambda: tv.SwinTransformer(
        **SMALL_SWIN, num_classes=CLASSES, block=tv.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=tv.swin_transformer.PatchMergingV2,
    ),
    "vgg": lambda: _narrow_classifier(VGG(make_layers([16, "M", 32, "M", 32, "M"], True), CLASSES)),
    "vision_transformer": lambda: tv.VisionTransformer(**SMALL_VIT, num_classes=CLASSES),
    "r3d (video)": lambda: tv.video.VideoResNet(
        tv.video.resnet.BasicBlock, [tv.video.resnet.Conv3DSimple] * 4, [1, 1, 1, 1], tv.video.resnet.BasicStem, CLASSES
    ),
    "deeplab_v3 (segmentation)": lambda: tv.segmentation.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=CLASSES
    ),
    "lraspp (segmentation)": lambda: tv.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=CLASSES
    ),
}  # fmt: skip


def timm_cases() -> dict[str, Case]:
    """Case by model."""
    named = {
        name: Case(partial(timm.create_model, name, num_classes=CLASSES, **sizes), _first(sizes.get("img_size", 64)))
        for name, sizes in TIMM.items()
    }
    return named | {name: Case(make, _first(32)) for name, make in TIMM_CLASSES.items()}


def torchvision_cases() -> dict[str, Case]:
    """Case by family."""
    sides = {"swin": 32, "swin_v2": 32, "vision_transformer": 32, "convnext": 32}
    found = {name: Case(make, _first(sides.get(name, 64))) for name, make in TORCHVISION.items()}
    found["r3d (video)"] = Case(TORCHVISION["r3d (video)"], _film)
    return found


def _narrow_classifier(model: nn.Module) -> nn.Module:
    """Hidden layers of 64 where AlexNet and VGG have 4096."""
    *_, last = (m for m in model.classifier if isinstance(m, nn.Linear))
    channels = {tv.AlexNet: 256, VGG: 32}[type(model)]
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    narrow = iter((nn.Linear(channels, 64), nn.Linear(64, 64), nn.Linear(64, last.out_features)))
    for i, module in enumerate(model.classifier):
        if isinstance(module, nn.Linear):
            model.classifier[i] = next(narrow)
    return model


def _first(size: Any) -> Callable[[nn.Module], dict[str, Any]]:
    side = size if isinstance(size, int) else size[0]

    def batch(model: nn.Module) -> dict[str, Any]:
        return {_argument(model): torch.randn(BATCH, 3, side, side)}

    return batch


def _film(model: nn.Module) -> dict[str, Any]:
    return {_argument(model): torch.randn(BATCH, 3, 4, 32, 32)}


def _argument(model: nn.Module) -> str:
    """The name of the picture in a model's forward."""
    return next(iter(inspect.signature(model.forward).parameters))
