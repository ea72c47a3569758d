"""What is trained of MAKE: small heads on the pooled features of its encoders.

    q = P · unit(x + F_q(x))         x = unit(mean of the query's token states)
    t = unit(y + F_t(y))             y = unit(mean of the title's token states)
    i = unit(F_i(norm((z − μ) / σ))) z = pooled features of the picture
    product = P · fuse(t, i)

Every F is a two-layer perceptron. F_q and F_t start at zero, so untrained heads are the text
encoder they stand on. The vectors are not yet of unit norm; the exported graphs see to that.

Shapes: B batch, D text width, F picture features, V vector_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from towers.two_towers import unit

PRODUCT_SCALE = 10.0
"""Of t∘i, whose entries would else be a tenth of those of t and i beside it."""
GATE_WIDTH = 256


def perceptron(width_in: int, hidden: int, width_out: int, *, zero: bool = False) -> nn.Sequential:
    """Two layers; `zero` makes it say nothing until it is trained."""
    bend = nn.Sequential(nn.GELU(), nn.Dropout(0.0))  # a training may raise it
    layers = nn.Sequential(nn.Linear(width_in, hidden), bend, nn.Linear(hidden, width_out))
    if zero:
        for parameter in layers[-1].parameters():
            nn.init.zeros_(parameter)
    return layers


class TextHead(nn.Module):
    """A text's mean state → its place in the space that both towers share."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.width = width
        self.residual = perceptron(width, hidden, width, zero=True)

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) → unit (B, D)."""
        features = unit(features)
        return unit(features + self.residual(features))


class ImageHead(nn.Module):
    """A picture's pooled features → the same space."""

    def __init__(self, features: int, hidden: int, width: int) -> None:
        super().__init__()
        self.features = features
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self.norm = nn.LayerNorm(features)
        self.layers = perceptron(features, hidden, width)

    def forward(self, features: Tensor) -> Tensor:
        """(B, F) → unit (B, D)."""
        return unit(self.layers(self.norm((features - self.mean) / self.std)))


class ModalAdaptation(nn.Module):
    """Title and picture → one vector, by weights that each product decides for itself.

        w = softmax(gate([t, i, 10 t∘i])) over the modalities that are there
        v = w_t t + w_i i + correct([t, i, 10 t∘i, m_t, m_i, w_t, w_i])

    m_t and m_i say what is there; what is not there is zero. `gate` and `correct` start at zero.
    `correct` is what lets one modality speak against the other: a weight alone only chooses
    between them.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = perceptron(3 * width, GATE_WIDTH, 2, zero=True)
        self.correct = perceptron(3 * width + 4, 2 * hidden, width, zero=True)

    def forward(self, title: Tensor, has_title: Tensor, image: Tensor, has_image: Tensor) -> Tensor:
        """Unit or zero (B, D) and 1/0 flags (B, 1), twice → (B, D)."""
        there = torch.cat([has_title, has_image], -1)  # (B, 2)
        both = torch.cat([title, image, PRODUCT_SCALE * title * image], -1)  # (B, 3D)
        weight = (self.gate(both) - 1e4 * (1.0 - there)).softmax(-1)
        correction = self.correct(torch.cat([both, there, weight], -1))
        return weight[:, :1] * title + weight[:, 1:] * image + correction


class MeanFusion(nn.Module):
    """Both modalities count the same, for every product."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()

    def forward(self, title: Tensor, has_title: Tensor, image: Tensor, has_image: Tensor) -> Tensor:
        """See ModalAdaptation."""
        return title + image


class ConcatFusion(nn.Module):
    """A perceptron over both, and nothing that keeps what was there before."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layers = perceptron(2 * width + 2, hidden, width)

    def forward(self, title: Tensor, has_title: Tensor, image: Tensor, has_image: Tensor) -> Tensor:
        """See ModalAdaptation."""
        return self.layers(torch.cat([title, image, has_title, has_image], -1))


class TitleAlone(MeanFusion):
    """As if there were no pictures."""

    def forward(self, title: Tensor, has_title: Tensor, image: Tensor, has_image: Tensor) -> Tensor:
        """See ModalAdaptation."""
        return title


class ImageAlone(MeanFusion):
    """As if there were no titles."""

    def forward(self, title: Tensor, has_title: Tensor, image: Tensor, has_image: Tensor) -> Tensor:
        """See ModalAdaptation."""
        return image


FUSIONS = {
    "modal_adaptation": ModalAdaptation,
    "mean": MeanFusion,
    "concat": ConcatFusion,
    "title": TitleAlone,
    "image": ImageAlone,
}


class Heads(nn.Module):
    """Both towers behind their encoders; `fusion` is one of FUSIONS."""

    def __init__(self, fusion: str, width: int, features: int, hidden: int, vector_dim: int):
        super().__init__()
        self.query_head = TextHead(width, hidden)
        self.title_head = TextHead(width, hidden)
        self.image_head = ImageHead(features, hidden, width)
        self.fusion = FUSIONS[fusion](width, hidden)
        self.projection = nn.Linear(width, vector_dim, bias=False)
        # Identity where the sizes allow it; else angles are roughly kept.
        start = nn.init.eye_ if width == vector_dim else nn.init.orthogonal_
        start(self.projection.weight)

    def query(self, features: Tensor) -> Tensor:
        """Mean token states (B, D) → (B, V)."""
        return self.projection(self.query_head(features))

    def product(self, title: Tensor, has_title: Tensor, image: Tensor, has_image: Tensor) -> Tensor:
        """Mean token states (B, D), pooled features (B, F), flags (B, 1) → (B, V)."""
        t = self.title_head(title) * has_title
        i = self.image_head(image) * has_image
        return self.projection(self.fusion(t, has_title, i, has_image))
