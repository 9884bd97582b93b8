from __future__ import annotations

import copy
import pickle

import pytest
import torch

from convinit import impulse_targets, init_vit_
from convinit.adapters.timm import attn_layer
from convinit.nn import ConvInitAttention

# ImportError as well: timm is there, but its torchvision was built for another torch
timm = pytest.importorskip("timm", exc_type=ImportError)
from timm.layers import Attention  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

IMPULSE = attn_layer((4, 4), kernel_size=3, peak=0.9)


def vit(attn_layer, **options):
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=16, patch_size=4, num_classes=5, embed_dim=32, depth=2, num_heads=4, class_token=False,
        global_pool="avg", qkv_bias=True, attn_layer=attn_layer, **options,
    )  # fmt: skip


@pytest.mark.parametrize("weight_init", ["", "jax", "moco", "skip", "reset"])
def test_impulses_survive_timms_own_initialisation(weight_init):
    model = vit(IMPULSE, weight_init=weight_init)
    for block in model.blocks:
        targets = impulse_targets(block.attn.offsets, (4, 4))
        attention = block.attn.attention_map(torch.zeros(1, 16, 32))[0]
        assert (attention.argmax(dim=2) == targets)[targets >= 0].all()


def test_trains_in_a_timm_vit_and_keeps_its_parameter_names():
    model = vit(IMPULSE, attn_drop_rate=0.1, proj_drop_rate=0.1)
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
    ours = ConvInitAttention(32, 4, (4, 4), variant="vanilla", qkv_bias=True, method="random")
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert missing == ["offsets", "_extra_state"] and not unexpected
    x = torch.randn(2, 16, 32)
    torch.testing.assert_close(ours(x), theirs(x))


def test_what_would_undo_the_fit_is_refused():
    with pytest.raises(ValueError, match="qk_norm must be False"):
        vit(IMPULSE, qk_norm=True)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_models_made_with_it_are_copied_and_pickled(copied):
    model = timm.create_model(  # create_model keeps its arguments in the model, attn_layer among them
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4,
        class_token=False, global_pool="avg", attn_layer=IMPULSE,
    )  # fmt: skip
    twin, images = copied(model), torch.randn(2, 3, 16, 16)
    assert torch.equal(twin(images), model(images))
    assert type(twin.blocks[0].attn) is ConvInitAttention


def test_init_vit_knows_such_a_model_without_a_position_embedding_of_its_own():
    model = vit(IMPULSE, pos_embed="none")
    report = init_vit_(model, peak=0.8, generator=torch.Generator().manual_seed(1))
    assert [record.name for record in report.records] == ["blocks.0.attn", "blocks.1.attn"]
    assert all((record.peak - 0.8).abs().max() < 0.02 for record in report.records)


def test_options_that_cannot_work_are_refused_before_a_model_is_made():
    with pytest.raises(ValueError, match="qkv_bias must not be given here: timm gives it"):
        attn_layer((4, 4), qkv_bias=True)
    with pytest.raises(ValueError, match="generator must not be given here"):
        attn_layer((4, 4), generator=torch.Generator())
    with pytest.raises(TypeError, match="options must be arguments of ConvInitAttention: .*'kernelsize'"):
        attn_layer((4, 4), kernelsize=3)
    with pytest.raises(ValueError, match="grid_size must be"):
        attn_layer((4,))
    with pytest.raises(ValueError, match="without a class token"):
        VisionTransformer(
            img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=4, attn_layer=IMPULSE
        )(torch.randn(1, 3, 16, 16))  # fmt: skip
