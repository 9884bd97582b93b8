"""`init_vit_` on the real models of other libraries."""

from __future__ import annotations

import copy
import json
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convinit
from convinit.adapters import AdditiveLayout
from convinit.adapters.find import find_layouts
from convinit.adapters.layout import Slot
from convinit.adapters.subspace import smooth_position
from convinit.init.subspace import row_space
from convinit.nn import sincos_2d

SIDE = 64  # pixels, in patches of 8


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def timm_vit(**options):
    pytest.importorskip("timm", exc_type=ImportError)
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": SIDE, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
    torch.manual_seed(0)
    return VisionTransformer(**{**sizes, **options})


def timm_deit():
    pytest.importorskip("timm", exc_type=ImportError)
    from timm.models.deit import VisionTransformerDistilled

    torch.manual_seed(0)
    return VisionTransformerDistilled(
        img_size=SIDE, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=5
    )


def timm_rope(**options):
    pytest.importorskip("timm", exc_type=ImportError)
    from timm.models.eva import Eva

    sizes = {"img_size": SIDE, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
    rope = {"attn_type": "rope", "use_abs_pos_emb": False, "use_rot_pos_emb": True, "rope_temperature": 100.0}
    torch.manual_seed(0)
    return Eva(**{**sizes, **rope, **options})


def torchvision_vit():
    pytest.importorskip("torchvision", exc_type=ImportError)
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(SIDE, 8, 3, 3, 48, 96)


def huggingface(kind: str):
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    options = {
        "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96,
        "image_size": SIDE, "patch_size": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "vit":
        return transformers.ViTForImageClassification(transformers.ViTConfig(**options))
    if kind == "deit":
        model = transformers.DeiTForImageClassification(transformers.DeiTConfig(**options))
        return model  # with a P of zeros
    if kind == "mae":
        return transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**options))  # P of zeros, too
    if kind in ("CLIPVision", "SiglipVision", "Dinov2", "Dinov2WithRegisters", "Beit"):
        return getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**options))
    options |= {"key_bias": True, "num_register_tokens": 2}
    return transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**options))


def vit_pytorch(kind: str, **options):
    library = pytest.importorskip("vit_pytorch", exc_type=ImportError)
    sizes = {
        "image_size": SIDE, "patch_size": 8, "num_classes": 5, "dim": 48, "depth": 3, "heads": 3,
        "dim_head": 16, "mlp_dim": 96,
    }  # fmt: skip
    torch.manual_seed(0)
    return getattr(library, kind)(**{**sizes, **options})


ADDITIVE = {
    "timm": timm_vit,
    "timm without class token": lambda: timm_vit(class_token=False, global_pool="avg"),
    "timm no qkv_bias, registers, no_embed_class": lambda: timm_vit(
        qkv_bias=False, reg_tokens=2, no_embed_class=True
    ),
    "timm qk_norm": lambda: timm_vit(qk_norm=True),
    "timm pre_norm (CLIP)": lambda: timm_vit(pre_norm=True),
    "timm rectangular": lambda: timm_vit(img_size=(32, 96)),
    "timm DeiT": timm_deit,
    "torchvision": torchvision_vit,
    "transformers ViT": lambda: huggingface("vit"),
    "transformers DeiT": lambda: huggingface("deit"),
    "transformers CLIP": lambda: huggingface("CLIPVision"),
    "transformers SigLIP": lambda: huggingface("SiglipVision"),
    "transformers DINOv2": lambda: huggingface("Dinov2"),
    "transformers DINOv2 with registers": lambda: huggingface("Dinov2WithRegisters"),
    "vit-pytorch ViT": lambda: vit_pytorch("ViT"),
    "vit-pytorch ViT, mean": lambda: vit_pytorch("ViT", pool="mean"),
    "vit-pytorch SimpleViT": lambda: vit_pytorch("SimpleViT"),
}
ROTARY = {
    "timm axial": timm_rope,
    "timm mixed": lambda: timm_rope(rope_type="mixed"),
    "timm DINOv3's, half": lambda: timm_rope(
        rope_type="dinov3", rope_rotate_half=True, num_reg_tokens=2, use_abs_pos_emb=True
    ),
    "transformers DINOv3": lambda: huggingface("dinov3"),
}


def image_size(model) -> tuple[int, int]:
    patches = getattr(model, "patch_embed", None)
    return tuple(patches.img_size) if patches is not None else (SIDE, SIDE)


def quietly(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return convinit.init_vit_(model, generator=seeded(), **options)


@pytest.mark.parametrize("name", [*ADDITIVE, *ROTARY])
def test_our_map_is_the_one_that_the_library_computes(name):
    """Captured inputs of a library's own attention, and what it makes of them."""
    model = {**ADDITIVE, **ROTARY}[name]().eval()
    quietly(model)
    (layout,) = find_layouts(model, grid_size=None, pos_embed=None, adapter=None)
    seen, made = {}, {}
    for attention in layout.attentions:
        module = model.get_submodule(attention.name)
        attention.reads.register_forward_pre_hook(
            lambda _, args, kwargs, key=attention.name: seen.update({key: (*args, *kwargs.values())[0]}),
            with_kwargs=True,
        )
        module.register_forward_hook(lambda _, args, out, key=attention.name: made.update({key: out}))
    with torch.no_grad():
        model(torch.randn(2, 3, *image_size(model)))
    assert len(made) == 3
    for attention in layout.attentions:
        x, out = seen[attention.name], made[attention.name]
        out = out[0] if isinstance(out, tuple) else out
        maps = attention.attention_map(x)
        v = F.linear(
            x, attention.value.weight.read(), attention.value.bias and attention.value.bias.read()
        ).unflatten(-1, (attention.num_heads, -1))
        mixed = torch.einsum("bhnm,bmhr->bnhr", maps, v).flatten(2)
        weight, bias = attention.output.weight.read(), attention.output.bias
        torch.testing.assert_close(out, F.linear(mixed, weight, bias and bias.read()), rtol=1e-4, atol=1e-5)


def photographs(size: tuple[int, int], first: int = 0, count: int = 8) -> torch.Tensor:
    """Standardised crops of two real photographs; others with another `first`."""
    datasets = pytest.importorskip("sklearn.datasets")
    made = []
    for i in range(first, first + count):
        photo = torch.from_numpy(datasets.load_sample_images().images[i % 2].copy()).permute(2, 0, 1) / 255
        side, g = 80 + 25 * (i % 5), seeded(i)
        y, x = (int(torch.randint(0, length - side, (), generator=g)) for length in photo.shape[1:])
        crop = photo[None, :, y : y + side, x : x + side]
        made.append(F.interpolate(crop, size, mode="bilinear", antialias=True)[0])
    return (torch.stack(made) - 0.45) / 0.23


def on_target(model, report, images) -> list[float]:
    """Mean attention on the targets of each layer, from what the library's own attention is given."""
    maps = convinit.adapters.head_maps(report, model, images)
    peaks = []
    for each, record in zip(maps, report.records, strict=True):
        inside = record.targets >= 0
        found = each.gather(2, record.targets.clamp(min=0)[..., None])[..., 0]
        peaks.append(float((found * inside).sum() / inside.sum()))
    return peaks


def drawn(name: str):
    """Whether the model keeps its grid; the warning for one that does not is tested apart."""
    return {"grid_size": (8, 8)} if name.startswith("vit-pytorch ViT") else {}


@pytest.mark.parametrize("name", ADDITIVE)
def test_the_plain_call(name):
    model, other = ADDITIVE[name](), ADDITIVE[name]()
    size = image_size(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = convinit.init_vit_(model, generator=seeded(), **drawn(name))
        seen = convinit.init_vit_(other, generator=seeded(), images=photographs(size))
    assert " on synthetic images " in report.summary() and " on your images, 0.70 was" in seen.summary()
    photos = photographs(size, first=8)
    assert on_target(model, report, photos) == pytest.approx([0.7] * 3, abs=0.22)
    limit = 0.1 if name.endswith("SimpleViT") else 0.07  # its sin-cos P is kept, smaller than ours
    assert on_target(other, seen, photos) == pytest.approx([0.7] * 3, abs=limit)
    for record in (*report.records, *seen.records):
        assert abs(record.peak.mean() - 0.7) < 0.02 and (record.hit_rate > 0.95).all()
        assert 0.2 < record.share < 0.95 and (record.prefix < 0.03).all()


def test_a_fixed_position_embedding_is_seen_in_deep_layers():
    """Its few strong directions need large logits, which norms of tokens that differ by 25 % there blur."""
    model = vit_pytorch("SimpleViT", depth=6, dim=96, dim_head=32, mlp_dim=384)
    images, others = photographs((SIDE, SIDE), count=64).split(32)
    report = convinit.init_vit_(model, generator=seeded(), images=images)
    assert report.missed() is None
    assert on_target(model, report, others) == pytest.approx([0.7] * 6, abs=0.07)


@pytest.mark.parametrize("name", ["timm", "timm qk_norm", "transformers DeiT", "vit-pytorch SimpleViT"])
def test_the_same_bits_however_often(name):
    model = ADDITIVE[name]()
    quietly(model)
    once = {key: value.clone() for key, value in model.state_dict().items()}
    quietly(model)
    assert all(torch.equal(once[key], value) for key, value in model.state_dict().items())
    fresh = ADDITIVE[name]()
    quietly(fresh)
    assert all(torch.equal(once[key], value) for key, value in fresh.state_dict().items())


@pytest.mark.parametrize(
    "name, options",
    [
        ("LayerScale", {"init_values": 1e-2}),
        ("SwiGLU", {"mlp_layer": "SwiGLU"}),
        ("post-norm", {"block_fn": "ResPostBlock"}),
        ("norm behind the patch embedding", {"embed_norm_layer": "LayerNorm"}),
        ("no bias", {"qkv_bias": False, "proj_bias": False}),
        ("bfloat16", {}),
        ("one head dropped to the width", {"num_heads": 1}),
    ],
)
def test_kinds_of_blocks(name, options):
    layers = pytest.importorskip("timm.layers", exc_type=ImportError)
    from timm.models import vision_transformer

    options = {
        key: getattr(layers if hasattr(layers, str(value)) else vision_transformer, value)
        if isinstance(value, str)
        else value
        for key, value in options.items()
    }
    model = timm_vit(**options)
    model = model.bfloat16() if name == "bfloat16" else model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = convinit.init_vit_(model, generator=seeded())
    assert all(abs(record.peak_on_images.mean() - 0.7) < 0.03 for record in report.records)
    for parameter in ("pos_embed", "cls_token"):
        assert getattr(model, parameter).isfinite().all()


def test_nothing_but_the_position_is_in_its_subspace():
    """Tokens of any images differ only outside V, in every layer."""
    model = timm_vit(reg_tokens=2).eval()
    report = quietly(model)
    P = model.pos_embed[0, 3:].detach()
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, 3:]))
    with torch.no_grad():
        model(10 * torch.randn(4, 3, SIDE, SIDE))
    V = torch.linalg.svd(P, full_matrices=False).Vh[:24].mT
    for x in seen:
        torch.testing.assert_close(x @ V, (P @ V).expand(4, -1, -1), rtol=0, atol=1e-4)
    assert 0.5 < report.records[0].share < 0.9


def test_controls_differ_in_queries_and_keys_alone():
    weights = {}
    for method in ("impulse", "scrambled", "norm_matched", "position_only"):
        model = timm_vit()
        report = quietly(model, method=method)
        weights[method] = dict(model.named_parameters())
        if method == "position_only":
            fresh = timm_vit().blocks[0].attn.qkv.weight[:96]
            assert torch.equal(model.blocks[0].attn.qkv.weight[:96], fresh)
            assert report.records[0].targets is None
    for name, value in weights["impulse"].items():
        for control in ("scrambled", "norm_matched", "position_only"):
            other = weights[control][name]
            if name.endswith("qkv.weight"):
                assert torch.equal(value[96:], other[96:]) and not torch.equal(value[:96], other[:96])
            elif not name.endswith("qkv.bias"):
                assert torch.equal(value, other), (control, name)


def test_a_position_embedding_that_is_kept():
    kept = timm_vit()
    smooth = sincos_2d((8, 8), 48)
    with torch.no_grad():
        kept.pos_embed[0, 1:] = smooth
    report = quietly(kept)
    assert torch.equal(kept.pos_embed[0, 1:], smooth)  # made for the grid: its row space is V
    assert all(abs(record.peak_on_images.mean() - 0.7) < 0.05 for record in report.records)
    quietly(kept, position="new")
    assert not torch.equal(kept.pos_embed[0, 1:], smooth)

    trained = timm_vit()
    with torch.no_grad():  # neighbours are alike, and all 48 dimensions are used
        trained.pos_embed[0, 1:] = 3 * smooth + 0.5 * torch.randn(64, 48)
    before = {key: value.clone() for key, value in trained.state_dict().items()}
    with pytest.raises(ValueError, match='not replaced unasked: position="new"'):
        convinit.init_vit_(trained)
    assert all(torch.equal(before[key], value) for key, value in trained.state_dict().items())

    trained = timm_vit()
    nn.init.normal_(trained.blocks[1].norm1.weight)
    with pytest.raises(
        ValueError,
        match="must not be trained yet, but blocks.1.norm1.* seems trained: its entries differ. Give a",
    ):
        convinit.init_vit_(trained)


def test_a_layer_that_nobody_knows_is_found_out_and_undone():
    class Stranger(nn.Module):
        def forward(self, x):
            return x + torch.linspace(-1, 1, x.shape[-1])

    model = timm_vit()
    model.blocks[1].norm2 = nn.Sequential(model.blocks[1].norm2)
    model.blocks[1].mlp = nn.Sequential(model.blocks[1].mlp, Stranger())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="blocks.2.attn sees in the subspace .* comes from elsewhere"):
        convinit.init_vit_(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_parallel_blocks_are_refused_by_name():
    pytest.importorskip("timm", exc_type=ImportError)
    from timm.models import vision_transformer

    for name in ("ParallelScalingBlock", "ParallelThingsBlock"):
        with pytest.raises(ValueError, match=f"one attention, then one MLP, got {name}"):
            convinit.init_vit_(timm_vit(block_fn=getattr(vision_transformer, name)))


def test_a_convolutional_stem():
    pytest.importorskip("timm", exc_type=ImportError)
    from timm.layers import HybridEmbed

    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 4, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU())
    model = timm_vit(embed_layer=lambda **options: HybridEmbed(stem, **{**options, "patch_size": 1}))
    report = quietly(model)
    assert report.grid_size == (8, 8)
    assert all(abs(record.peak_on_images.mean() - 0.7) < 0.03 for record in report.records)


def test_frozen_writers_are_named():
    model = timm_vit()
    model.patch_embed.proj.requires_grad_(False)  # MoCo v3
    with pytest.raises(ValueError, match="patch_embed.proj.weight is frozen"):
        convinit.init_vit_(model, position="subspace")
    before = model.patch_embed.proj.weight.clone()
    report = quietly(model)
    assert report.notes == ["position embedding kept as it is: patch_embed.proj.weight is frozen"]
    assert torch.equal(model.patch_embed.proj.weight, before)


def test_numbers_of_numpy_and_another_default_device():
    numpy = pytest.importorskip("numpy")
    for options in ({"layers": numpy.arange(2)}, {"layers": numpy.int64(1)}, {"peak": numpy.float32(0.6)}):
        assert quietly(timm_vit(), **options).records
    model = timm_vit(qk_norm=True)
    model.blocks[0].requires_grad_(False)
    with torch.device("meta"):
        assert "3 layers" in quietly(model).summary()


@pytest.mark.parametrize("side, window", [(4, 3), (7, 3), (8, 3), (10, 5), (14, 7), (24, 7)])
def test_the_window_follows_the_grid(side, window):
    model = timm_vit(img_size=2 * side, patch_size=2, depth=2)
    report = quietly(model, position="keep")
    assert report.options["kernel_size"] == window
    offsets = torch.cat([record.offsets for record in report.records])
    assert offsets.abs().max() <= window // 2 and len(offsets.unique(dim=0)) == 6


@pytest.mark.parametrize("name", ADDITIVE)
def test_heads_get_their_impulses(name):
    model = ADDITIVE[name]()
    if "DeiT" in name and "transformers" in name:
        nn.init.trunc_normal_(model.deit.embeddings.position_embeddings, std=0.02)
    report = quietly(model, pos_embed_gain=200.0, images=torch.randn(2, 3, *image_size(model)))
    assert [record.layer for record in report.records] == [0, 1, 2]
    height, width = report.grid_size
    assert (height, width) == tuple(side // 8 for side in image_size(model))
    for record in report.records:
        targets = convinit.impulse_targets(record.offsets, report.grid_size)
        assert torch.equal(record.targets, targets)
        mean = record.peak.mean()
        assert 0.68 < mean < 0.72  # also with class tokens, which get next to nothing
        assert (record.hit_rate > 0.8).all()
        assert (record.prefix < 0.02).all()
    # Content and residual branches blur the first layer least.
    assert report.records[0].peak_on_images.mean() > 0.5


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_models_get_theirs_through_biases(name):
    model = ROTARY[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = quietly(model, values="default", images=torch.randn(2, 3, SIDE, SIDE))
    peaks = torch.cat([record.peak for record in report.records])
    assert (peaks > 0.6).all() and 0.65 < peaks.mean() < 0.72
    assert all((record.hit_rate > 0.95).all() for record in report.records)
    assert torch.cat([record.peak_on_images for record in report.records]).mean() > 0.5
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all(key.endswith("bias") for key in changed)


@pytest.mark.parametrize("values", ["default", "mimetic"])
def test_nothing_else_changes(values):
    model = timm_vit()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    quietly(model, values=values)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    parts = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc2.weight")
    assert changed == {
        "pos_embed", "cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias",
        *(f"blocks.{i}.{part}" for i in range(3) for part in parts),
    }  # fmt: skip
    for i in range(3):
        key = f"blocks.{i}.attn.qkv.weight"
        same = torch.equal(model.state_dict()[key][96:], before[key][96:])
        assert same == (values == "default")


def test_mimetic_values_and_biases():
    model = timm_vit(embed_dim=96)
    for block in model.blocks:
        nn.init.normal_(block.attn.qkv.bias)
        nn.init.normal_(block.attn.proj.bias)
    quietly(model, position="keep")
    attn = model.blocks[0].attn
    product = (attn.proj.weight @ attn.qkv.weight[192:]).detach()
    assert -0.5 < product.diagonal().mean() < -0.3  # 0.4 Z − 0.4 I
    assert not attn.qkv.bias.any() and not attn.proj.bias.any()


def test_a_gain_is_applied_once():
    first, second = timm_vit(), timm_vit()
    quietly(first, pos_embed_gain=18.0)
    quietly(second, pos_embed_gain=18.0)
    quietly(second, pos_embed_gain=18.0)
    for (name, one), (_, other) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    quietly(second, pos_embed_gain=9.0)  # another setting undoes the first
    fresh = timm_vit()
    torch.testing.assert_close(second.pos_embed[:, 1:], 9 * fresh.pos_embed[:, 1:])
    assert torch.equal(second.pos_embed[:, :1], fresh.pos_embed[:, :1])  # the class token keeps its row
    second.set_input_size(2 * SIDE)  # another tensor, the same P
    resized = second.pos_embed.clone()
    quietly(second, pos_embed_gain=9.0)
    assert torch.equal(second.pos_embed, resized)


@pytest.mark.parametrize(
    "options", [{"position": "keep"}, {"pos_embed_gain": 1.01}, {"pos_embed_gain": 20.0}]
)
def test_a_peak_that_images_blur_away_warns(options):
    with pytest.warns(UserWarning, match="on synthetic images, is 0.* 0.70 was asked"):
        report = convinit.init_vit_(timm_vit(), generator=seeded(), **options)
    assert str(report).startswith("peak 0.") and " on synthetic images " in report.summary()


def test_qk_norm_sets_the_peak_by_its_own_weights():
    model = timm_vit(qk_norm=True)
    report = quietly(model, peak=0.5)
    for block, record in zip(model.blocks, report.records, strict=True):
        assert (block.attn.q_norm.weight == block.attn.k_norm.weight).all()
        assert 0.49 < record.peak.mean() < 0.51
        assert "qk_norm" in record.note


def test_controls_under_qk_norm_have_the_temperature_of_the_impulses():
    weights = {}
    for method in ("impulse", "scrambled", "norm_matched"):
        model = timm_vit(qk_norm=True)
        quietly(model, method=method, pos_embed_gain=60.0)
        weights[method] = [float(block.attn.q_norm.weight[0].detach()) for block in model.blocks]
    assert weights["impulse"] == weights["scrambled"] == weights["norm_matched"]
    assert all(0.5 < weight < 2 for weight in weights["impulse"])


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_models_and_reports_are_copied_together(copied):
    model = timm_vit(reg_tokens=2)
    model.report = quietly(model)
    other = copy.deepcopy(model) if copied == "deepcopy" else pickle.loads(pickle.dumps(model))
    nn.init.zeros_(model.cls_token)
    nn.init.zeros_(model.pos_embed)
    layout, layer = other.report.places[0]
    fresh = timm_vit(reg_tokens=2)
    expected, _ = quietly(fresh).places[0]
    assert torch.equal(layout.position_maps(layer), expected.position_maps(0))


def test_position_embedding_that_is_not_saved():
    model, new = vit_pytorch("SimpleViT"), vit_pytorch("SimpleViT")
    with pytest.warns(UserWarning, match="not in its state_dict"):
        convinit.init_vit_(model, pos_embed_gain=4.0)
    quietly(new, method="default", values="default", pos_embed_gain=4.0)
    new.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, SIDE, SIDE)
    assert torch.equal(new(images), model(images))


def test_grid_that_the_model_does_not_keep():
    sizes = {"image_size": (64, 16)}
    report = quietly(vit_pytorch("ViT", **sizes), grid_size=(8, 2))
    assert report.grid_size == (8, 2)
    with pytest.raises(ValueError, match="H·W = 16"):
        convinit.init_vit_(vit_pytorch("ViT", **sizes), grid_size=(8, 3))
    with pytest.raises(ValueError, match="grid_size must be given"):
        convinit.init_vit_(vit_pytorch("ViT", image_size=(64, 24)))
    with pytest.warns(UserWarning, match="16 tokens: taken for 4 x 4"):
        convinit.init_vit_(vit_pytorch("ViT", **sizes))
    for kind in ("ViT", "SimpleViT"):  # images show the grid, a sin-cos P as well
        given = {"images": torch.randn(2, 3, 64, 16)} if kind == "ViT" else {}
        report = quietly(vit_pytorch(kind, **sizes), **given)
        assert report.grid_size == (8, 2) and report.records[0].peak_on_images.mean() > 0.6


def test_images_that_the_model_does_not_take():
    model = timm_vit(dynamic_img_size=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="129 tokens in place of 65"):
        convinit.init_vit_(model, images=torch.randn(1, 3, 2 * SIDE, SIDE))
    with pytest.raises(ValueError, match=r"could not be run on \[1, 3, 9, 9\]"):
        convinit.init_vit_(model, images=torch.randn(1, 3, 9, 9))
    with pytest.raises(ValueError, match="could not be run on ndarray"):
        convinit.init_vit_(model, images=torch.randn(1, 3, SIDE, SIDE).numpy())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    report = quietly(model, images=torch.randn(1, 3, 2 * SIDE, SIDE), position="keep")
    assert report.records[0].peak_on_images is None and "129 tokens in place of 65" in report.notes[0]


def test_learned_rotary_frequencies_are_followed():
    model = timm_rope(rope_type="mixed")
    report = quietly(model)
    layout, layer = report.places[0]
    before = layout.position_maps(layer)
    with torch.no_grad():
        model.rope.freqs *= 1.5
    assert (layout.position_maps(layer) - before).abs().max() > 0.1


def test_stratified_offsets_cover_the_window_over_the_layers():
    report = quietly(timm_vit())
    offsets = torch.cat([record.offsets for record in report.records])
    assert len(offsets) == len(offsets.unique(dim=0)) == 9  # 3 layers of 3 heads, 3 × 3 window
    assert offsets.abs().max() == 1


@pytest.mark.parametrize("given", ["fixed", "random", "tensor", "by layer"])
def test_offsets(given):
    tensor = torch.tensor([[0, 1], [2, 0], [0, 0]]).repeat(3, 1)
    offsets = {"tensor": tensor, "by layer": tensor.view(3, 3, 2)}.get(given, given)
    report = quietly(timm_vit(), offsets=offsets)
    got = torch.cat([record.offsets for record in report.records])
    if given == "fixed":
        assert got.tolist() == [[0, 0], [-1, 0], [0, 1]] * 3
    elif given == "random":
        assert torch.equal(got, convinit.sample_offsets(9, 3, generator=seeded()))
    else:
        assert torch.equal(got, tensor)


@pytest.mark.parametrize(
    "layers, chosen", [("all", [0, 1, 2]), (slice(1, None), [1, 2]), (-1, [2]), ([2, 0], [0, 2])]
)
def test_layers(layers, chosen):
    model, fresh = timm_vit(), timm_vit()
    report = quietly(model, layers=layers)
    assert [record.layer for record in report.records] == chosen
    for i, (block, other) in enumerate(zip(model.blocks, fresh.blocks, strict=True)):
        assert torch.equal(block.attn.qkv.weight, other.attn.qkv.weight) == (i not in chosen)


@pytest.mark.parametrize("method", ["mimetic", "scrambled", "norm_matched", "random", "default"])
def test_other_initialisations(method):
    impulse = quietly(timm_vit())
    model = timm_vit()
    report = quietly(model, method=method)
    peak = torch.cat([record.peak for record in report.records])
    norm, other = (torch.cat([record.weight_norm for record in each.records]) for each in (report, impulse))
    if method in ("mimetic", "random", "default"):
        assert peak.isnan().all() and report.records[0].targets is None
    if method in ("scrambled", "norm_matched"):
        shares = [
            torch.cat([torch.full((3,), layout.attentions[i].share) for layout, i in each.places])
            for each in (report, impulse)
        ]
        torch.testing.assert_close(norm * shares[0], other * shares[1], rtol=1e-4, atol=0)
    if method == "scrambled":
        targets = report.records[0].targets
        assert torch.equal(targets.sort(dim=1).values, torch.arange(64).expand(3, -1))
        assert report.records[0].offsets is None
    if method == "default":
        assert torch.equal(model.blocks[0].attn.qkv.weight[:96], timm_vit().blocks[0].attn.qkv.weight[:96])
    if method == "random":
        assert model.blocks[1].attn.qkv.weight[:96].abs().max() <= 48**-0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid_size", [(2, 2), (2, 3), (2, 4), (3, 3), (1, 4), (14, 14)])
def test_a_second_call_knows_the_position_embedding_of_the_first(grid_size, dtype):
    model = timm_vit(img_size=(8 * grid_size[0], 8 * grid_size[1]), embed_dim=192).to(dtype)
    first = quietly(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again = quietly(model)
    after = model.state_dict()
    assert (first.options["position"], again.options["position"]) == ("new", "subspace")
    for name in ("pos_embed", "cls_token", "patch_embed.proj.weight", "blocks.1.mlp.fc2.weight"):
        assert torch.equal(before[name], after[name])


def test_rounding_adds_no_directions():
    P = smooth_position((14, 14), 192, 64, torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert row_space(P.to(dtype).float(), dtype).shape == (192, 64)


def test_the_report_says_that_the_position_embedding_was_kept():
    model = timm_vit()
    model.blocks[0].mlp.fc2.weight.requires_grad_(False)
    report = quietly(model)
    assert (
        report.options["position"] == "keep" and "kept as it is: blocks.0.mlp.fc2.weight" in report.notes[0]
    )


def test_the_papers_fits_leave_the_position_embedding():
    model, P = timm_vit(), timm_vit().pos_embed
    peaks = quietly(model, fit="svd").records[1].peak
    assert torch.equal(model.pos_embed, P) and (peaks > 0.2).all()
    report = quietly(model, fit=convinit.fit.Adam(steps=20), layers=0)
    assert report.options["fit"].startswith("Adam(") and report.options["position"] == "keep"


@pytest.mark.parametrize("variant", ["vanilla", "I", "II", "III"])
def test_own_models(variant):
    model = convinit.models.SimpleViT(
        32, 4, 5, dim=48, depth=2, num_heads=3, head_dim=16, mlp_dim=48, variant=variant, method="default"
    )
    images = torch.randn(2, 3, 32, 32)
    report = quietly(model, images=images, alpha=0.1)
    assert torch.cat([record.peak for record in report.records]).sub(0.7).abs().max() < 0.02
    real = model.attention_maps(images)
    for record, block, maps in zip(report.records, model.blocks, real, strict=True):
        assert torch.equal(block.attn.offsets, record.offsets)
        inside = record.targets >= 0
        on_target = maps.gather(3, record.targets.clamp(min=0).expand(2, -1, -1)[..., None])[..., 0]
        peaks = (on_target * inside).sum(dim=2) / inside.sum(dim=1)
        torch.testing.assert_close(record.peak_on_images, peaks.mean(dim=0).double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("values", ["mimetic", "default"])
def test_the_vanilla_model_keeps_its_position_undisturbed(values):
    """As it is made, and in front of attention whatever the images; init_vit_ also sets how sharp it is."""

    def made(**options):
        sizes = {"dim": 48, "depth": 3, "num_heads": 3, "head_dim": 16, "mlp_dim": 48, "variant": "vanilla"}
        return convinit.models.SimpleViT(32, 4, 5, **sizes, **options, generator=seeded())

    model, images = made(values=values), photographs((32, 32))
    V = row_space(model.pos_embed, torch.float32).float()
    tokens = model.embed(images)
    for block in model.blocks:
        assert ((tokens @ V) - 0.8 * model.pos_embed @ V).abs().max() < 1e-4
        tokens = block(tokens)
    assert (made(values=values, fit="svd").embed(images) @ V - 0.8 * model.pos_embed @ V).abs().max() > 0.1

    report = convinit.init_vit_(model, images=images, generator=seeded())
    assert report.options["position"] == "subspace"
    assert on_target(model, report, photographs((32, 32), first=8)) == pytest.approx([0.7] * 3, abs=0.07)
    again = {key: value.clone() for key, value in model.state_dict().items()}
    convinit.init_vit_(model, images=images, generator=seeded())
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("options", [{"variant": "I"}, {"variant": "vanilla", "pos_embed": "identity"}])
def test_own_models_whose_position_is_not_to_be_chosen(options):
    model = convinit.models.SimpleViT(16, 4, 5, dim=32, depth=1, num_heads=2, head_dim=16, **options)
    assert "position" not in quietly(model).options
    for given in ({"position": "subspace"}, {"position": "keep"}, {"pos_embed_gain": 2.0}):
        with pytest.raises(ValueError, match="position and pos_embed_gain must be None"):
            convinit.init_vit_(model, **given)


def test_models_inside_models_and_wrappers():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = timm_vit()

    report = quietly(Classifier())
    assert report.records[1].name == "backbone.blocks.1.attn"
    plain, compiled = timm_vit(), torch.compile(timm_vit())
    quietly(plain)
    assert quietly(compiled).records[1].name == "blocks.1.attn"
    assert torch.equal(plain.blocks[1].attn.qkv.weight, compiled.blocks[1].attn.qkv.weight)


def test_parameter_kinds():
    exact, low, frozen = timm_vit(), timm_vit().bfloat16(), timm_vit()
    quietly(exact, pos_embed_gain=60.0)
    report = quietly(low, pos_embed_gain=60.0)
    assert low.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert torch.cat([record.peak for record in report.records]).mean() > 0.65  # of the rounded weights
    frozen.blocks[1].attn.qkv.weight.requires_grad_(False)
    report = quietly(frozen)
    assert "frozen" in report.records[1].note and report.records[1].targets is None
    assert torch.equal(frozen.blocks[1].attn.qkv.weight, timm_vit().blocks[1].attn.qkv.weight)
    assert not torch.equal(frozen.blocks[0].attn.qkv.weight, timm_vit().blocks[0].attn.qkv.weight)


def test_meta_device():
    with torch.device("meta"):
        model = timm_vit()
    with pytest.raises(ValueError, match="to_empty"):
        convinit.init_vit_(model)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights()
    report = quietly(model)
    assert torch.cat([record.peak for record in report.records]).mean() > 0.65


class Ordinary(nn.Module):
    """What many write themselves: convolution, class token, learned P, PyTorch's encoder layers."""

    def __init__(self, norm_first=True, own_attention=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.cls = nn.Conv2d(1, 48, 4, 4), nn.Parameter(torch.randn(1, 1, 48))
        self.pos = nn.Parameter(0.02 * torch.randn(1, 50, 48))
        layer = nn.TransformerEncoderLayer(48, 3, 96, batch_first=True, norm_first=norm_first)
        self.blocks = (
            nn.ModuleList(Block() for _ in range(3))
            if own_attention
            else nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).layers
        )
        self.head = nn.Linear(48, 10)

    def forward(self, x):
        x = self.embed(x).flatten(2).mT
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.behind = nn.LayerNorm(48), nn.LayerNorm(48)
        self.attention = nn.MultiheadAttention(48, 3, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48))

    def forward(self, x):
        y = self.before(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.behind(x))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", [{}, {"norm_first": False}, {"own_attention": True}])
def test_an_ordinary_vit_of_ones_own(kind, given):
    """The norm in front of the attention and the class token are nowhere said."""
    model = Ordinary(**kind)
    images = {"images": photographs((28, 28)).mean(dim=1, keepdim=True)} if given else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = convinit.init_vit_(
            model, grid_size=(7, 7), pos_embed=model.pos[0, 1:], generator=seeded(), **images
        )
    for record in report.records:
        assert abs(record.peak.mean() - 0.7) < 0.02 and abs(record.peak_on_images.mean() - 0.7) < 0.03
        assert (record.weight_norm < 30).all() and (record.prefix_on_images < 0.05).all()
    others = photographs((28, 28), first=8).mean(dim=1, keepdim=True)
    limit = 0.07 if given else 0.2
    assert all(abs(peak - 0.7) < limit for peak in on_target(model, report, others))


def test_a_norm_that_nobody_mentioned():
    model = Ordinary()
    by_hand = {"grid_size": (7, 7), "pos_embed": model.pos[0, 1:]}
    with pytest.raises(ValueError, match="rms is 0.02.* A norm in front"):
        convinit.init_vit_(Ordinary(own_attention=True), **by_hand, position="keep")
    own = Ordinary(own_attention=True)
    with pytest.warns(UserWarning, match="0.70 was asked"):
        report = convinit.init_vit_(
            own, grid_size=(7, 7), pos_embed=own.pos[0, 1:], pos_embed_gain=20.0, generator=seeded()
        )
    assert report.records[0].prefix_on_images is not None  # the class token is counted by a forward pass


class Plain(nn.Module):
    """Nobody's model: a position embedding and PyTorch's own encoder layers."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.pos = nn.Parameter(torch.randn(1, 24, 32))
        self.batch_first = options["batch_first"]
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.1, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        x = 0.1 * x + self.pos
        return self.encoder(x if self.batch_first else x.transpose(0, 1))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_grid_and_position_by_hand(norm_first, batch_first):
    model = Plain(norm_first=norm_first, batch_first=batch_first)
    with pytest.raises(
        ValueError, match=r"(?s)encoder.layers.0.self_attn: 2 heads of 16.*pos: \[1, 24, 32\]"
    ):
        convinit.init_vit_(model)
    by_hand = {"grid_size": (4, 6), "pos_embed": model.pos, "images": torch.randn(2, 24, 32)}
    with pytest.raises(ValueError, match="comes from elsewhere"):  # the tokens that are given to it
        convinit.init_vit_(model, **by_hand)
    report = quietly(model, **by_hand, position="keep")
    assert torch.cat([record.peak for record in report.records]).sub(0.7).abs().max() < 0.03
    assert report.records[0].peak_on_images.min() > 0.5
    assert model.training


def test_a_bare_attention_and_its_own_weights():
    mha, P = nn.MultiheadAttention(32, 2, batch_first=True), torch.randn(24, 32, generator=seeded())
    report = quietly(mha, grid_size=(4, 6), pos_embed=P, peak=0.9)
    _, maps = mha(P[None], P[None], P[None], average_attn_weights=False)
    targets = report.records[0].targets
    assert (maps[0].argmax(dim=2) == targets)[targets >= 0].all()


def test_own_adapter():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(24, 32))
            self.mix = nn.MultiheadAttention(32, 2)

    def adapter(module, name):
        if not isinstance(module, Odd):
            return None
        from convinit.adapters.torch_nn import attention

        return AdditiveLayout(
            name, module, (4, 6), [attention(module.mix, "mix")], position=Slot(module.table)
        )

    model = Odd()
    with pytest.raises(ValueError, match="not all layers that write"):
        convinit.init_vit_(model, adapter=adapter)
    assert quietly(model, adapter=adapter, position="keep").records[0].peak.mean() > 0.65


def test_report(capsys):
    model = timm_vit()
    report = quietly(model, pos_embed_gain=60.0, images=torch.randn(2, 3, SIDE, SIDE))
    rows = list(report.rows())
    assert len(rows) == 9 and rows[4]["layer"] == 1 and rows[4]["head"] == 1
    text = str(report)
    assert "(+0,+0)" in text and "on images" in text and len(text.splitlines()) == 13
    assert text.startswith("peak 0.") and max(map(len, text.splitlines())) <= 100
    parsed = json.loads(report.to_json())
    assert parsed["heads"][0]["name"] == "blocks.0.attn" and parsed["grid_size"] == [8, 8]
    assert json.loads(quietly(timm_vit(), method="mimetic").to_json())["heads"][0]["peak"] is None
    pandas = pytest.importorskip("pandas")
    frame = report.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and math.isclose(frame["peak"].mean(), 0.7, abs_tol=0.02)


def test_masked_autoencoder():
    model = huggingface("mae")
    report = quietly(model, images=photographs((SIDE, SIDE)))  # all of their tokens, in order
    assert all(abs(record.peak_on_images.mean() - 0.7) < 0.03 for record in report.records)
    assert "same for all tokens: filled" in report.notes[0]
    assert model(torch.randn(1, 3, SIDE, SIDE)).mask.sum() == 48  # it masks again


def swin(library: str):
    pytest.importorskip(library, exc_type=ImportError)
    torch.manual_seed(0)
    if library == "timm":
        from timm.models.swin_transformer import SwinTransformer

        return SwinTransformer(56, 2, embed_dim=24, depths=(2, 2), num_heads=(2, 4), num_classes=5)
    if library == "torchvision":
        from torchvision.models.swin_transformer import SwinTransformer

        return SwinTransformer([2, 2], 24, [2, 2], [2, 4], [7, 7])
    from transformers import SwinConfig, SwinModel

    config = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "patch_size": 2, "image_size": 56}
    return SwinModel(SwinConfig(window_size=7, **config))


def maps_of_the_biases(model, report) -> list[torch.Tensor]:
    """softmax(bias) [heads, 49, 49] of each layer, as the library itself reads its table."""
    maps = []
    for record in report.records:
        module = model.get_submodule(record.name)
        bias = (
            getattr(module, "relative_position_bias", None)
            or getattr(module, "_get_rel_pos_bias", None)
            or module.get_relative_position_bias
        )
        maps.append(bias()[0].detach().double().softmax(dim=-1))
    return maps


SWINS = ["timm", "torchvision", "transformers"]


@pytest.mark.parametrize("library", SWINS)
def test_swin(library):
    model = swin(library)
    report = quietly(model, images=torch.randn(1, 3, 56, 56), peak=0.6)
    assert len(report.records) == 4 and report.grid_size == (7, 7)
    assert torch.cat([record.peak for record in report.records]).sub(0.6).abs().max() < 1e-5
    assert torch.cat([record.peak_on_images for record in report.records]).mean() > 0.5
    wrapped = quietly(model, padding_mode="circular")
    for record, maps in zip(wrapped.records, maps_of_the_biases(model, wrapped), strict=True):
        targets = convinit.impulse_targets(record.offsets, (7, 7), padding_mode="circular")
        on_target = maps.gather(2, targets.unsqueeze(2))
        torch.testing.assert_close(on_target, torch.full_like(on_target, 0.7), rtol=0, atol=1e-6)


@pytest.mark.parametrize("library", SWINS)
def test_controls_of_swin(library):
    models = {method: swin(library) for method in ("impulse", "scrambled", "norm_matched")}
    reports = {method: quietly(model, method=method) for method, model in models.items()}
    for method in ("scrambled", "norm_matched"):
        again = swin(library)
        quietly(again, method=method)
        for (name, first), second, impulse in zip(
            models[method].named_parameters(), again.parameters(), models["impulse"].parameters(), strict=True
        ):
            assert torch.equal(first, second)  # by the same generator
            assert torch.equal(first, impulse) != ("relative_position_bias_table" in name)

    # Scrambled: each token has a target of its own, as sharp as an impulse's, and out of the window's reach.
    y, x = torch.cartesian_prod(torch.arange(7), torch.arange(7)).unbind(1)
    maps = maps_of_the_biases(models["scrambled"], reports["scrambled"])
    for record, each in zip(reports["scrambled"].records, maps, strict=True):
        peak, target = each.max(dim=2)
        assert torch.equal(target, record.targets) and record.offsets is None
        assert torch.equal(target.sort(dim=1).values, torch.arange(49).expand_as(target))
        torch.testing.assert_close(peak, torch.full_like(peak, 0.7), rtol=0, atol=1e-6)
        torch.testing.assert_close(record.peak, peak.mean(dim=1), rtol=0, atol=1e-6)
        assert ((y[target] - y).abs().maximum((x[target] - x).abs()) > 1).all()  # f = 3
    # Norm-matched: the size of the impulse without its sharpness.
    maps = maps_of_the_biases(models["norm_matched"], reports["norm_matched"])
    records = zip(reports["norm_matched"].records, reports["impulse"].records, maps, strict=True)
    for record, impulse, each in records:
        torch.testing.assert_close(record.weight_norm, impulse.weight_norm, rtol=1e-5, atol=0)
        assert torch.equal(record.targets, impulse.targets) and torch.equal(record.offsets, impulse.offsets)
        assert (each.amax(dim=2).mean(dim=1) < 0.15).all() and (record.peak < 0.1).all()


@pytest.mark.parametrize("method", ["scrambled", "norm_matched"])
def test_what_swin_pays_to_the_targets_of_a_control(method):
    """Against the softmax that timm's own attention computes on images."""
    model = swin("timm").eval()
    images, made = torch.randn(2, 3, 56, 56), {}
    report = quietly(model, method=method, images=images)
    for name, module in model.named_modules():
        if name.endswith("attn"):
            module.fused_attn = False
            module.softmax.register_forward_hook(lambda *call, key=name: made.update({key: call[2]}))
    with torch.no_grad():
        model(images)
    for record in (report.records[0], report.records[2]):  # whose windows are not shifted
        targets = record.targets[:, :, None].expand(len(made[record.name]), -1, -1, 1)
        paid = made[record.name].gather(3, targets.clamp(min=0))[..., 0]
        inside = targets[..., 0] >= 0
        expected = (paid * inside).sum(dim=(0, 2)) / inside.sum(dim=(0, 2))
        torch.testing.assert_close(record.peak_on_images, expected.double(), rtol=0, atol=1e-6)
        assert ((expected > 0.6) == (method == "scrambled")).all()


@pytest.mark.parametrize("library", SWINS)
def test_mimetic_swin(library):
    """Queries and keys have no size of the grid; only they, values and output layers change."""
    model, fresh = swin(library), swin(library)
    report = quietly(model, method="mimetic")
    layout = find_layouts(model, grid_size=None, pos_embed=None, adapter=None)[0]
    for record, attention in zip(report.records, layout.attentions, strict=True):
        wq, wk = (each.double() for each in attention.qk_weights())
        product = wq @ wk.mT  # the best rank-r part of 0.7·Z + 0.7·I
        assert torch.linalg.matrix_rank(product).tolist() == [12] * len(product)
        diagonal = product.diagonal(dim1=1, dim2=2).mean()
        assert 0.2 < diagonal < 0.7 and product.mean().abs() < 0.1 * diagonal
        torch.testing.assert_close(
            record.weight_norm, (wq.flatten(1).norm(dim=1) * wk.flatten(1).norm(dim=1)).sqrt()
        )
        assert record.targets is None and record.peak.isnan().all()
    for (name, parameter), other in zip(model.named_parameters(), fresh.parameters(), strict=True):
        if "relative_position_bias_table" in name:
            assert torch.equal(parameter, other)


def test_mlp_mixer():
    pytest.importorskip("timm", exc_type=ImportError)
    from timm.models.mlp_mixer import MlpMixer

    def mixer(dim):
        return MlpMixer(5, SIDE, patch_size=16, num_blocks=2, embed_dim=dim)

    model = mixer(80)
    report = quietly(model)  # 40 hidden units, 16 tokens: two offsets
    matrices = convinit.impulse_matrix(report.records[0].offsets, (4, 4))
    assert torch.equal(model.blocks[0].mlp_tokens.fc1.weight[:32].view(2, 16, 16), matrices)
    assert all((record.hit_rate == 1).all() for record in report.records)
    with pytest.raises(ValueError, match="hidden unit for each token"):
        convinit.init_vit_(mixer(16))
    with pytest.raises(ValueError, match="it has no queries and keys"):
        convinit.init_vit_(model, method="mimetic")


def test_controls_of_an_mlp_mixer():
    """Scrambled: each half of the hidden units reads every token once. Norm-matched: the norms alone."""
    mlp_mixer = pytest.importorskip("timm.models.mlp_mixer", exc_type=ImportError)
    mixers = {}
    for method in ("impulse", "scrambled", "norm_matched"):
        torch.manual_seed(0)
        model = mlp_mixer.MlpMixer(5, SIDE, patch_size=16, num_blocks=2, embed_dim=80)  # 40 units, 16 tokens
        report = quietly(model, method=method)
        if method == "scrambled":  # timm's own MLP sums the tokens that the permutations point at
            x = torch.randn(3, 8, 16)
            for record, block in zip(report.records, model.blocks, strict=True):
                expected = sum(F.gelu(x[..., target]) for target in record.targets) / math.sqrt(2 + 2 * 0.187)
                torch.testing.assert_close(block.mlp_tokens(x), expected)
        mixers[method] = (
            [(b.mlp_tokens.fc1.weight[:32], b.mlp_tokens.fc2.weight) for b in model.blocks],
            report,
        )
    impulses, _ = mixers["impulse"]
    scrambled, report = mixers["scrambled"]
    for (fc1, fc2), (_, expected_fc2), record in zip(scrambled, impulses, report.records, strict=True):
        halves = fc1.view(2, 16, 16)
        assert ((halves == 0) | (halves == 1)).all() and torch.equal(halves.argmax(dim=2), record.targets)
        assert (halves.sum(dim=1) == 1).all() and (halves.sum(dim=2) == 1).all()
        assert torch.equal(fc2, expected_fc2) and record.offsets is None and (record.hit_rate == 1).all()
    assert not torch.equal(*(record.targets for record in report.records))
    matched, report = mixers["norm_matched"]
    for pair, expected in zip(matched, impulses, strict=True):
        for weight, like in zip(pair, expected, strict=True):
            torch.testing.assert_close(weight.norm(), like.norm())
        assert (pair[0] != 0).all() and (pair[1][:, :32] != 0).all() and (pair[1][:, 32:] == 0).all()
    assert all(record.peak.max() < 0.2 for record in report.records)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "sgd"}, "method must be one of impulse"),
        ({"values": "all"}, "values must be"),
        ({"peak": 1.0}, r"peak must be below 1"),
        ({"peak": 0.5, "weight_norm": 3.0}, "not both"),
        ({"alpha": 0.5}, "alpha must be None for VisionTransformer"),
        ({"position": "learned"}, "position must be one of subspace, new, keep"),
        ({"position": "subspace", "pos_embed_gain": 2.0}, "not both"),
        ({"pos_embed_gain": -1}, "pos_embed_gain must lie"),
        ({"layers": 7}, "layers must lie in 0 to 2"),
        ({"layers": []}, "at least one"),
        ({"offsets": torch.zeros(4, 2).long()}, r"offsets must be \[9, 2\]"),
        ({"offsets": "fixed", "kernel_size": 5}, "kernel_size must be 3"),
        ({"pos_embed": torch.zeros(4, 48)}, "together"),
        ({"grid_size": (8, 7)}, "H·W = 64"),
        ({"padding_mode": "wrap", "pos_embed_gain": 5.0}, "padding_mode must be"),
        ({"fit": "svd", "peak": 0.5, "pos_embed_gain": 5.0}, "peak must be None"),
        (
            {"grid_size": (8, 8), "pos_embed": torch.randn(64, 48), "pos_embed_gain": 5.0},
            "parameter or buffer of the model",
        ),
        ({"grid_size": (2, 2), "pos_embed": torch.zeros(4, 7)}, r"pos_embed must be \[4, 48\]"),
    ],
)
def test_errors(options, message):
    model = timm_vit()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=message):
        convinit.init_vit_(model, **options)
    assert all(map(torch.equal, before, model.parameters()))


def test_models_that_cannot():
    with pytest.raises(ValueError, match="No attention in it is known"):
        convinit.init_vit_(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
        convinit.init_vit_(None)
    with pytest.raises(ValueError, match="differs between tokens"):
        model = timm_vit()
        nn.init.zeros_(model.pos_embed)
        convinit.init_vit_(model, position="keep")
    with pytest.raises(ValueError, match="which BEiT does not"):
        convinit.init_vit_(huggingface("Beit"))
    with pytest.raises(ValueError, match="biases on queries and keys"):
        convinit.init_vit_(timm_rope(qkv_bias=False))
    with pytest.raises(ValueError, match="pos_embed_gain must be None"):
        convinit.init_vit_(timm_rope(), pos_embed_gain=18)


@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "old weight_norm", "pruning"])
@pytest.mark.parametrize(
    "part", ["blocks.0.attn.qkv", "blocks.1.attn.proj", "blocks.1.mlp.fc2", "patch_embed.proj"]
)
def test_weights_that_another_module_computes_are_refused(how, part):
    from torch.nn.utils import parametrizations, prune, weight_norm

    model = timm_vit()
    layer = model.get_submodule(part)
    {
        "weight_norm": parametrizations.weight_norm,
        "spectral_norm": parametrizations.spectral_norm,
        "old weight_norm": weight_norm,
        "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.0),
    }[how](layer)
    with pytest.raises(ValueError, match="must hold .* in parameters or buffers of its own"):
        convinit.init_vit_(model)


def test_adapters_and_other_layers_are_refused_by_name():
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        weight = property(lambda self: self.base.weight)
        bias = property(lambda self: self.base.bias)

        def forward(self, x):
            return self.base(x) + x.mean()

    model = timm_vit()
    model.blocks[0].attn.qkv = Adapter(model.blocks[0].attn.qkv)
    with pytest.raises(
        ValueError, match="must have nn.Linear layers where convinit sets weights, got Adapter"
    ):
        convinit.init_vit_(model)
    quantised = torch.ao.quantization.quantize_dynamic(timm_vit(), {nn.Linear})
    with pytest.raises(ValueError, match="got Linear of torch.ao.nn.quantized.dynamic"):
        convinit.init_vit_(quantised)


@pytest.mark.parametrize("part", ["pos_embed", "cls_token", "blocks.0.norm1.weight"])
def test_numbers_that_are_not_finite_are_named(part):
    model = timm_vit()
    nn.init.constant_(model.get_parameter(part), math.nan)
    with pytest.raises(ValueError, match=f"{part} holds NaN"):
        convinit.init_vit_(model)


def test_layers_that_share_an_attention_are_refused():
    model = timm_vit()
    model.blocks[2].attn = model.blocks[0].attn
    with pytest.raises(ValueError, match="layers 0 and 2 share those of blocks.0.attn"):
        convinit.init_vit_(model)
    assert len(convinit.init_vit_(model, layers=[0, 1]).records) == 2


def test_a_resized_model_is_another():
    model = timm_vit()
    report = quietly(model)
    monitor = convinit.DriftMonitor(report, every=1)
    model.set_input_size(2 * SIDE)
    for use in (monitor.step, lambda: convinit.adapters.head_maps(report)):
        with pytest.raises(ValueError, match="position embedding in parameters .* since"):
            use()


def test_flat_shards_are_refused():
    class FullyShardedDataParallel(nn.Sequential):
        """The name is all that is looked at; FSDP1 itself needs several processes."""

    with pytest.raises(ValueError, match="FSDP2"):
        convinit.init_vit_(FullyShardedDataParallel(timm_vit()))
