"""EfficientNet-Lite0 as a picture's pooled features, in plain PyTorch.

Architecture: Tan and Le, "EfficientNet", ICML 2019, in its "Lite" form (no squeeze-and-excite,
ReLU6, stem and head not scaled). Layer names follow the public PyTorch weights, so that these
load with `strict=True`. TensorFlow's SAME padding is kept: the weights were trained with it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# repeats, kernel, stride of the first, expansion, channels out
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280
EARLY_BLOCKS = (0, 2, 4, 10)
"""Whose outputs are pooled too: the last layer has lost much of what colour and texture were."""
POOLED_FEATURES = HEAD_CHANNELS + 16 + 24 + 40 + 112
BATCH_NORM_EPS = 1e-3  # TensorFlow's value, not PyTorch's


class SameConv(nn.Conv2d):
    """A bias-free convolution that pads as TensorFlow's SAME does: the odd pixel goes last."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(cin, cout, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for side in (3, 2):  # F.pad wants the last axis first
            kernel, stride = self.kernel_size[0], self.stride[0]
            need = max(kernel - 1 - (x.shape[side] - 1) % stride, 0)
            pads += [need // 2, need - need // 2]
        return super().forward(F.pad(x, pads) if any(pads) else x)


class InvertedResidual(nn.Module):
    """Expand, filter by channel, project; added to the input where the shape allows it."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = cin * expansion
        self.expands = expansion != 1
        self.adds = stride == 1 and cin == cout
        if self.expands:
            self._expand_conv = SameConv(cin, wide, 1)
            self._bn0 = nn.BatchNorm2d(wide, BATCH_NORM_EPS)
        self._depthwise_conv = SameConv(wide, wide, kernel, stride, groups=wide)
        self._bn1 = nn.BatchNorm2d(wide, BATCH_NORM_EPS)
        self._project_conv = SameConv(wide, cout, 1)
        self._bn2 = nn.BatchNorm2d(cout, BATCH_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    """Pictures → features of every depth."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv(3, STEM_CHANNELS, 3, stride=2)
        self._bn0 = nn.BatchNorm2d(STEM_CHANNELS, BATCH_NORM_EPS)
        self._blocks = nn.ModuleList()
        channels = STEM_CHANNELS
        for repeats, kernel, stride, expansion, out in STAGES:
            for i in range(repeats):
                block = InvertedResidual(channels, out, kernel, stride if i == 0 else 1, expansion)
                self._blocks.append(block)
                channels = out
        self._conv_head = SameConv(channels, HEAD_CHANNELS, 1)
        self._bn1 = nn.BatchNorm2d(HEAD_CHANNELS, BATCH_NORM_EPS)

    def forward(self, image: Tensor) -> Tensor:
        """Normalised float32 (B, 3, H, W) → float32 (B, 1472): means over the whole picture."""
        maps, means = self.early(image)
        return torch.cat([self.late(maps), *means], -1)

    def early(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Up to the last of EARLY_BLOCKS: its maps (B, 112, H/16, W/16), and each one's means."""
        x = F.relu6(self._bn0(self._conv_stem(image)))  # (B, 32, H/2, W/2)
        means = []
        for number in range(EARLY_BLOCKS[-1] + 1):
            x = self._blocks[number](x)
            if number in EARLY_BLOCKS:
                means.append(x.mean((2, 3)))
        return x, means

    def late(self, maps: Tensor) -> Tensor:
        """The rest: (B, 112, H/16, W/16) → means (B, 1280)."""
        for block in self._blocks[EARLY_BLOCKS[-1] + 1 :]:
            maps = block(maps)
        return F.relu6(self._bn1(self._conv_head(maps))).mean((2, 3))

    def late_parameters(self) -> list[nn.Parameter]:
        """Those of `late`."""
        blocks = self._blocks[EARLY_BLOCKS[-1] + 1 :]
        return [*blocks.parameters(), *self._conv_head.parameters(), *self._bn1.parameters()]
