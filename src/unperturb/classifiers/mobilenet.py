"""A small MobileNetV2 (Sandler et al. 2018, "MobileNetV2: inverted residuals and linear bottlenecks")."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from unperturb.classifiers.base import classifiers

# expansion, channels, blocks, stride of the first one: table 2 with fewer blocks and without its last stage
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 2, 2), (6, 64, 3, 2), (6, 96, 2, 1), (6, 160, 1, 2))


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out" if groups == 1 else "fan_in")
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([nn.ReLU6()] if act else []))


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection, and a shortcut where the shape stays (figure 4)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.layers = nn.Sequential(
            *([_conv(inputs, hidden, 1)] if expansion > 1 else []),
            _conv(hidden, hidden, 3, stride, groups=hidden),
            _conv(hidden, outputs, 1, act=False),
        )
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.shortcut else self.layers(x)


@classifiers.register("mobilenet")
def mobilenet(
    *,
    channels: int,
    size: int,
    classes: int,
    width: float = 1.0,
    head: int = 640,
    strides: Sequence[int] | None = None,
) -> nn.Module:
    """51 million multiply-accumulates at 32x32, 61 million at 128x128. Takes any size.

    width: multiplies the channels. head: features before the last layer. strides: of the first convolution and of the
    second stage; the paper's (2, 2) from 96 pixels on, (2, 1) from 64 on and (1, 1) below, unless given.
    """
    stem_stride, early_stride = strides or (2 if size >= 64 else 1, 2 if size >= 96 else 1)
    inputs = max(8, round(32 * width / 8) * 8)
    layers: list[nn.Module] = [_conv(channels, inputs, 3, stem_stride)]
    for stage, (expansion, base, blocks, stride) in enumerate(_STAGES):
        outputs = max(8, round(base * width / 8) * 8)
        for block in range(blocks):
            first = early_stride if stage == 1 else stride
            layers.append(InvertedResidual(inputs, outputs, 1 if block else first, expansion))
            inputs = outputs
    layers.append(_conv(inputs, head, 1))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(head, classes))
