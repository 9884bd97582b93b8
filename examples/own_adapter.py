"""init_vit_ for a model that convinit does not know: an adapter says where its attentions and positions are.

python examples/own_adapter.py
"""

import torch
import torch.nn.functional as F
from torch import nn

import convinit
from convinit.adapters import AdditiveLayout, Layout, LinearWeights, SelfAttention, Slot


class Attention(nn.Module):
    """Somebody's pre-norm attention: one layer for the queries, one for keys and values."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(dim)
        self.to_q, self.to_kv, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        parts = (self.to_q(x), *self.to_kv(x).chunk(2, dim=-1))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """Somebody's ViT on 32×32 images: 8×8 patches behind one class token."""

    def __init__(self, dim: int = 96, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, kernel_size=4, stride=4)
        self.class_token = nn.Parameter(torch.randn(1, dim) * 0.02)
        self.positions = nn.Parameter(torch.randn(65, dim) * 0.02)
        self.layers = nn.ModuleList(Attention(dim, heads) for _ in range(depth))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = self.patches(images).flatten(2).mT  # [B, 64, D]
        x = torch.cat([self.class_token.expand(len(images), 1, -1), patches], dim=1) + self.positions
        for layer in self.layers:
            x = x + layer(x)
        return x[:, 0]


def adapter(module: nn.Module, name: str) -> Layout | None:
    """Called with every module inside the model; None means: not mine."""
    if not isinstance(module, Encoder):
        return None
    attentions = []
    for i, layer in enumerate(module.layers):
        dim, r = layer.to_q.in_features, layer.to_q.out_features // layer.heads
        key, value = (LinearWeights.of(layer.to_kv, slice(j * dim, (j + 1) * dim)) for j in range(2))
        # What comes into to_q has been through the LayerNorm: that is what queries and keys are made from.
        attentions.append(
            SelfAttention(
                f"{name}.layers.{i}".lstrip("."), layer.to_q, layer.heads, r, r**-0.5,
                LinearWeights.of(layer.to_q), key, value, LinearWeights.of(layer.out), norm=layer.norm,
            )
        )  # fmt: skip
    return AdditiveLayout(
        name, module, (8, 8), attentions,
        position=Slot(module.positions, slice(1, None)),  # the rows of the patches
        prefix=[Slot(module.class_token)],
        prefix_position=Slot(module.positions, slice(1)),
        content=module.patches,
        writers=[LinearWeights.of(module.patches)],  # the attentions' output layers beside them
        image_shape=image_shape,
    )  # fmt: skip


def image_shape(grid_size: tuple[int, int]) -> tuple[int, int, int]:
    return 3, 4 * grid_size[0], 4 * grid_size[1]


if __name__ == "__main__":
    torch.manual_seed(0)
    model = Encoder()
    report = convinit.init_vit_(model, adapter=adapter)
    print(report)
