"""ProxylessNAS-Mobile (Cai, Zhu, Han, 2019, arXiv:1812.00332, Figure 4), and TinyTL's lite residual beside its blocks.

The names of its tensors are those of the published weights (``blocks.N.conv``, in older files
``blocks.N.mobile_inverted_conv``), where the two blocks that the search left out have numbers too. TinyTL (Cai et al.,
2020, arXiv:2007.11622) publishes the same network with lite residuals, group norm and standardised convolutions.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FIRST, LAST = 32, 1280
# (kernel, expansion, outputs, stride) of each block; None was left out: its input goes on as it is
BLOCKS: tuple[tuple[int, int, int, int] | None, ...] = (
    (3, 1, 16, 1),
    (5, 3, 32, 2), (3, 3, 32, 1), None, None,
    (7, 3, 40, 2), (3, 3, 40, 1), (5, 3, 40, 1), (5, 3, 40, 1),
    (7, 6, 80, 2), (5, 3, 80, 1), (5, 3, 80, 1), (5, 3, 80, 1),
    (5, 6, 96, 1), (5, 3, 96, 1), (5, 3, 96, 1), (5, 3, 96, 1),
    (7, 6, 192, 2), (7, 6, 192, 1), (7, 3, 192, 1), (7, 3, 192, 1),
    (7, 6, 320, 1),
)  # fmt: skip
EPS = 1e-3  # of batch norms
STANDARDISING_EPS = 1e-5
CHANNELS_A_GROUP = 8  # of TinyTL's group norms
LITE_KERNEL, LITE_GROUPS, LITE_POOLING = 5, 2, 2


class StandardisedConv2d(nn.Conv2d):
    """y = conv(x, (W − mean)/(std + ε)), mean and (unbiased) std of each output channel's weights."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = w / (w.flatten(1).std(1) + STANDARDISING_EPS).view(-1, 1, 1, 1)
        return self._conv_forward(x, w, self.bias)


class Layer(nn.Module):
    """relu6(norm(conv(x))), or without the ReLU6."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, *, act: bool, plain: bool
    ) -> None:
        super().__init__()
        self.conv = _conv(plain)(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = _norm(outputs, plain)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:  # (B, inputs, H, W) -> (B, outputs, H/stride, W/stride)
        x = self.bn(self.conv(x))
        return F.relu6(x) if self.act else x


class InvertedBottleneck(nn.Module):
    """1×1 to expansion · inputs channels (left out where that is 1), k×k depthwise, 1×1 to outputs without a ReLU6."""

    def __init__(self, inputs: int, kernel: int, expansion: int, outputs: int, stride: int, *, plain: bool) -> None:
        super().__init__()
        middle = inputs * expansion
        self.inverted_bottleneck = Layer(inputs, middle, 1, act=True, plain=plain) if expansion > 1 else None
        self.depth_conv = Layer(middle, middle, kernel, stride, middle, act=True, plain=plain)
        self.point_linear = Layer(middle, outputs, 1, act=False, plain=plain)

    def forward(self, x: Tensor) -> Tensor:
        if self.inverted_bottleneck is not None:
            x = self.inverted_bottleneck(x)
        return self.point_linear(self.depth_conv(x))


class LiteResidual(nn.Module):
    """main(x) + up(norm₂(conv₁ₓ₁(relu(norm₁(conv_k(pool(x))))))): a branch on a picture of half the size.

    Its last norm begins at 0, so that the function is at first that of ``main``.
    """

    def __init__(self, main: nn.Module, inputs: int, outputs: int, kernel: int, stride: int, *, plain: bool) -> None:
        super().__init__()
        self.main_branch = main
        self.lite_residual = nn.ModuleDict(
            {
                "conv1": _conv(plain)(inputs, inputs, kernel, stride, kernel // 2, groups=LITE_GROUPS, bias=False),
                "bn1": _norm(inputs, plain),
                "conv2": _conv(plain)(inputs, outputs, 1, bias=False),
                "final_bn": _norm(outputs, plain),
            }
        )
        _initialise(self.lite_residual)
        nn.init.zeros_(self.lite_residual["final_bn"].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        main, lite = self.main_branch(x), self.lite_residual
        y = F.avg_pool2d(x, LITE_POOLING) if min(x.shape[2:]) >= LITE_POOLING else x
        y = lite["final_bn"](lite["conv2"](F.relu(lite["bn1"](lite["conv1"](y)))))
        return main + F.interpolate(y, main.shape[2:], mode="bilinear")


class Block(nn.Module):
    """conv(x), plus x where the shapes agree; x alone where the search left the block out."""

    def __init__(self, conv: nn.Module | None, shortcut: bool) -> None:
        super().__init__()
        self.conv, self.shortcut = conv, shortcut

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is None:
            return x
        return self.conv(x) + x if self.shortcut else self.conv(x)


class Classifier(nn.Module):
    """Dropout and the last layer, under the published name ``linear``."""

    def __init__(self, inputs: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout, self.linear = nn.Dropout(dropout), nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.dropout(x))


class ProxylessMobile(nn.Module):
    """``model(pixels)``: (B, 3, S, S) -> (B, classes); S is 224 where it was searched."""

    def __init__(self, classes: int = 1000, *, dropout: float = 0.2, plain: bool = True) -> None:
        """
        Args:
            plain: with batch norms; else TinyTL's group norms and standardised convolutions.
        """
        super().__init__()
        self.plain = plain
        self.first_conv = Layer(3, FIRST, 3, 2, act=True, plain=plain)
        blocks, channels = [], FIRST
        for number, block in enumerate(BLOCKS):
            if block is None:
                blocks.append(Block(None, True))
                continue
            kernel, expansion, outputs, stride = block
            made = InvertedBottleneck(channels, kernel, expansion, outputs, stride, plain=plain)
            blocks.append(Block(made, number > 0 and stride == 1 and channels == outputs))
            channels = outputs
        self.blocks = nn.ModuleList(blocks)
        self.feature_mix_layer = Layer(channels, LAST, 1, act=True, plain=plain)
        self.classifier = Classifier(LAST, classes, dropout)
        _initialise(self)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.first_conv(pixels)
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.feature_mix_layer(x).mean((2, 3)))


def add_lite_residuals(model: ProxylessMobile) -> None:
    """Put TinyTL's branch beside every block but the first, in place; one that has them is left as it is.

    Kernels are of 5, and of 3 where half of the block's picture is smaller than that, counted from 128 as TinyTL does.
    """
    size, channels = 128, FIRST
    for number, (block, row) in enumerate(zip(model.blocks, BLOCKS, strict=True)):
        if row is None:
            continue
        _, _, outputs, stride = row
        if number > 0 and not isinstance(block.conv, LiteResidual):
            kernel = LITE_KERNEL
            while size // LITE_POOLING < kernel:
                kernel -= 2
            assert isinstance(block.conv, nn.Module)
            block.conv = LiteResidual(block.conv, channels, outputs, kernel, stride, plain=model.plain)
        size, channels = (size // stride if number > 0 else size), outputs


def made_for(tensors: Mapping[str, Tensor], classes: int) -> ProxylessMobile:
    """The variant whose weights these are: batch norms or TinyTL's, with lite residuals or without."""
    model = ProxylessMobile(classes, plain="first_conv.bn.running_mean" in tensors)
    if any(".lite_residual." in name for name in tensors):
        add_lite_residuals(model)
    return model


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights of any age under the names here."""
    return {name.replace(".mobile_inverted_conv.", ".conv."): value for name, value in tensors.items()}


def _conv(plain: bool) -> type[nn.Conv2d]:
    return nn.Conv2d if plain else StandardisedConv2d


def _norm(channels: int, plain: bool) -> nn.Module:
    return nn.BatchNorm2d(channels, eps=EPS) if plain else nn.GroupNorm(channels // CHANNELS_A_GROUP, channels, eps=EPS)


def _initialise(module: nn.Module) -> None:
    """He's initial values by the outputs; norms and the last layer as PyTorch begins them."""
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")
