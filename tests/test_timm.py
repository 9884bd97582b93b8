from __future__ import annotations

import pytest
import torch

from convinit import impulse_targets
from convinit.nn import ConvInitAttention

# ImportError as well: timm is there, but its torchvision was built for another torch
timm = pytest.importorskip("timm", exc_type=ImportError)
from timm.layers import Attention  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402


class ImpulseAttention(ConvInitAttention):
    """timm wants a class that it calls with its own arguments; the grid is all that it does not know."""

    def __init__(self, dim: int, num_heads: int = 8, **options):
        super().__init__(dim, num_heads, (4, 4), variant="I", kernel_size=3, peak=0.9, **options)


def vit(attn_layer, **options):
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=16, patch_size=4, num_classes=5, embed_dim=32, depth=2, num_heads=4, class_token=False,
        global_pool="avg", qkv_bias=True, attn_layer=attn_layer, **options,
    )  # fmt: skip


@pytest.mark.parametrize("weight_init", ["", "jax", "moco", "skip", "reset"])
def test_impulses_survive_timms_own_initialisation(weight_init):
    model = vit(ImpulseAttention, weight_init=weight_init)
    for block in model.blocks:
        targets = impulse_targets(block.attn.offsets, (4, 4))
        attention = block.attn.attention_map(torch.zeros(1, 16, 32))[0]
        assert (attention.argmax(dim=2) == targets)[targets >= 0].all()


def test_trains_in_a_timm_vit_and_keeps_its_parameter_names():
    model = vit(ImpulseAttention, attn_drop_rate=0.1, proj_drop_rate=0.1)
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 5
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    names = {name: p.shape for name, p in model.named_parameters()}
    assert names == {name: p.shape for name, p in vit(Attention).named_parameters()}


def test_vanilla_computes_what_timms_attention_computes():
    theirs = Attention(32, num_heads=4, qkv_bias=True)
    ours = ConvInitAttention(32, 4, (4, 4), variant="vanilla", qkv_bias=True, init="random")
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert missing == ["offsets"] and not unexpected
    x = torch.randn(2, 16, 32)
    torch.testing.assert_close(ours(x), theirs(x))


def test_what_would_undo_the_fit_is_refused():
    with pytest.raises(ValueError, match="qk_norm must be False"):
        vit(ImpulseAttention, qk_norm=True)
