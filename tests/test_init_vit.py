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
        nn.init.trunc_normal_(model.deit.embeddings.position_embeddings, std=0.02)  # zero in that library
        return model
    if kind == "mae":
        model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**options))
        with torch.no_grad():  # a fresh one of transformers 5.23 has zeros there
            model.vit.embeddings.position_embeddings[0, 1:] = sincos_2d((8, 8), 48)
        return model
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
    quietly(model, **({"pos_embed_gain": 30.0} if name in ADDITIVE else {}))
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


@pytest.mark.parametrize("name", ADDITIVE)
def test_heads_get_their_impulses(name):
    model = ADDITIVE[name]()
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
    report = quietly(model, values="keep", images=torch.randn(2, 3, SIDE, SIDE))
    peaks = torch.cat([record.peak for record in report.records])
    assert (peaks > 0.6).all() and 0.65 < peaks.mean() < 0.72
    assert all((record.hit_rate > 0.95).all() for record in report.records)
    assert torch.cat([record.peak_on_images for record in report.records]).mean() > 0.5
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all(key.endswith("bias") for key in changed)


@pytest.mark.parametrize("values", ["keep", "mimetic"])
def test_nothing_else_changes(values):
    model = timm_vit()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    quietly(model, values=values)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {
        f"blocks.{i}.attn.{part}.weight"
        for i in range(3)
        for part in ("qkv", "proj")[: 1 + (values == "mimetic")]
    }
    for i in range(3):
        key = f"blocks.{i}.attn.qkv.weight"
        same = torch.equal(model.state_dict()[key][96:], before[key][96:])
        assert same == (values == "keep")


def test_mimetic_values_and_biases():
    model = timm_vit(embed_dim=96)
    for block in model.blocks:
        nn.init.normal_(block.attn.qkv.bias)
        nn.init.normal_(block.attn.proj.bias)
    quietly(model)
    attn = model.blocks[0].attn
    product = (attn.proj.weight @ attn.qkv.weight[192:]).detach()
    assert -0.5 < product.diagonal().mean() < -0.3  # 0.4 Z − 0.4 I
    assert not attn.qkv.bias.any() and not attn.proj.bias.any()


def test_one_seed_one_result_however_often():
    first, second = timm_vit(), timm_vit()
    options = {"pos_embed_gain": 18.0, "alpha": 0.5}
    quietly(first, **options)
    quietly(second, **options)
    quietly(second, **options)
    for (name, one), (_, other) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    quietly(second, pos_embed_gain=18.0)  # another setting undoes the first
    fresh = timm_vit()
    quietly(fresh, pos_embed_gain=18.0)
    torch.testing.assert_close(second.pos_embed, fresh.pos_embed)


def test_scale_of_position_and_content():
    model, fresh = timm_vit(), timm_vit()
    quietly(model, pos_embed_gain=18.0, alpha=0.25)
    torch.testing.assert_close(model.pos_embed[:, 1:], 18 * 0.75 * fresh.pos_embed[:, 1:])
    assert torch.equal(model.pos_embed[:, :1], fresh.pos_embed[:, :1])  # the class token keeps its row
    torch.testing.assert_close(model.patch_embed.proj.weight, 0.25 * fresh.patch_embed.proj.weight)
    with pytest.warns(UserWarning, match="pos_embed_gain, about"):
        convinit.init_vit_(timm_vit())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convinit.init_vit_(timm_vit(), pos_embed_gain=60)


def test_qk_norm_sets_the_peak_by_its_own_weights():
    model = timm_vit(qk_norm=True)
    report = quietly(model, peak=0.5)
    for block, record in zip(model.blocks, report.records, strict=True):
        assert (block.attn.q_norm.weight == block.attn.k_norm.weight).all()
        assert 0.49 < record.peak.mean() < 0.51
        assert "qk_norm" in record.note


def test_controls_under_qk_norm_have_the_temperature_of_the_impulses():
    weights = {}
    for method in ("newton", "scrambled", "norm_matched"):
        model = timm_vit(qk_norm=True)
        quietly(model, method=method, pos_embed_gain=60.0)
        weights[method] = [float(block.attn.q_norm.weight[0]) for block in model.blocks]
    assert weights["newton"] == weights["scrambled"] == weights["norm_matched"]
    assert all(0.5 < weight < 2 for weight in weights["newton"])


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_models_and_reports_are_copied_together(copied):
    model = timm_vit(reg_tokens=2)
    model.report = quietly(model)
    other = copy.deepcopy(model) if copied == "deepcopy" else pickle.loads(pickle.dumps(model))
    nn.init.zeros_(model.cls_token)
    nn.init.zeros_(model.pos_embed)
    layout, layer = other.report.places[0]
    fresh = timm_vit(reg_tokens=2)
    quietly(fresh)
    (expected,) = find_layouts(fresh, grid_size=None, pos_embed=None, adapter=None)
    assert torch.equal(layout.position_maps(layer), expected.position_maps(0))


def test_position_embedding_that_is_not_saved():
    model, new = vit_pytorch("SimpleViT"), vit_pytorch("SimpleViT")
    with pytest.warns(UserWarning, match="not in its state_dict"):
        convinit.init_vit_(model, pos_embed_gain=4.0)
    quietly(new, method="keep", values="keep", pos_embed_gain=4.0)
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


def test_images_of_another_size_are_not_measured():
    model = timm_vit(dynamic_img_size=True)
    report = quietly(model, images=torch.randn(1, 3, 2 * SIDE, SIDE))
    assert report.records[0].peak_on_images is None
    assert "129 tokens in place of 65" in report.notes[0]
    with pytest.warns(UserWarning, match="could not be run"):
        report = convinit.init_vit_(timm_vit().bfloat16(), images=torch.randn(1, 3, SIDE, SIDE))
    assert len(report.records) == 3


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


@pytest.mark.parametrize("method", ["mimetic", "scrambled", "norm_matched", "svd", "keep", "adam"])
def test_other_initialisations(method):
    options = {} if method != "adam" else {"layers": 0}
    chosen = convinit.fit.Adam(steps=20) if method == "adam" else method
    impulse = quietly(timm_vit(), **options)
    model = timm_vit()
    report = quietly(model, method=chosen, **options)
    peak = torch.cat([record.peak for record in report.records])
    norm, other = (torch.cat([record.weight_norm for record in each.records]) for each in (report, impulse))
    if method in ("mimetic", "keep"):
        assert peak.isnan().all() and report.records[0].targets is None
    if method in ("scrambled", "norm_matched"):
        torch.testing.assert_close(norm, other, rtol=1e-4, atol=0)
    if method == "scrambled":
        targets = report.records[0].targets
        assert torch.equal(targets.sort(dim=1).values, torch.arange(64).expand(3, -1))
        assert report.records[0].offsets is None
    if method == "keep":
        assert torch.equal(model.blocks[0].attn.qkv.weight[:96], timm_vit().blocks[0].attn.qkv.weight[:96])
    if method == "svd":
        assert (peak > 0.2).all()


@pytest.mark.parametrize("variant", ["vanilla", "I", "II", "III"])
def test_own_models(variant):
    model = convinit.models.SimpleViT(
        32, 4, 5, dim=48, depth=2, num_heads=3, head_dim=16, mlp_dim=48, variant=variant, init="default"
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
    report = quietly(model, grid_size=(4, 6), pos_embed=model.pos, images=torch.randn(2, 24, 32))
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
    assert quietly(model, adapter=adapter).records[0].peak.mean() > 0.65


def test_report(capsys):
    model = timm_vit()
    report = quietly(model, pos_embed_gain=60.0, images=torch.randn(2, 3, SIDE, SIDE))
    rows = list(report.rows())
    assert len(rows) == 9 and rows[4]["layer"] == 1 and rows[4]["head"] == 1
    text = str(report)
    assert "(+0,+0)" in text and "on images" in text and len(text.splitlines()) == 11
    parsed = json.loads(report.to_json())
    assert parsed["heads"][0]["name"] == "blocks.0.attn" and parsed["grid_size"] == [8, 8]
    assert json.loads(quietly(timm_vit(), method="mimetic").to_json())["heads"][0]["peak"] is None
    pandas = pytest.importorskip("pandas")
    frame = report.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and math.isclose(frame["peak"].mean(), 0.7, abs_tol=0.02)


def test_masked_autoencoder_is_fitted_and_says_nothing_of_images():
    model = huggingface("mae")
    report = quietly(model, images=torch.randn(2, 3, SIDE, SIDE), pos_embed_gain=6.0)
    assert torch.cat([record.peak for record in report.records]).mean() > 0.65
    assert report.records[0].peak_on_images is None  # three quarters of the tokens are masked out
    assert "17 tokens in place of 65" in report.notes[0]


@pytest.mark.parametrize("library", ["timm", "torchvision", "transformers"])
def test_swin(library):
    pytest.importorskip(library, exc_type=ImportError)
    torch.manual_seed(0)
    if library == "timm":
        from timm.models.swin_transformer import SwinTransformer

        model = SwinTransformer(56, 2, embed_dim=24, depths=(2, 2), num_heads=(2, 4), num_classes=5)
    elif library == "torchvision":
        from torchvision.models.swin_transformer import SwinTransformer

        model = SwinTransformer([2, 2], 24, [2, 2], [2, 4], [7, 7])
    else:
        from transformers import SwinConfig, SwinModel

        config = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "patch_size": 2, "image_size": 56}
        model = SwinModel(SwinConfig(window_size=7, **config))
    report = quietly(model, images=torch.randn(1, 3, 56, 56), peak=0.6)
    assert len(report.records) == 4 and report.grid_size == (7, 7)
    assert torch.cat([record.peak for record in report.records]).sub(0.6).abs().max() < 1e-5
    assert torch.cat([record.peak_on_images for record in report.records]).mean() > 0.5
    with pytest.raises(ValueError, match="scrambled"):
        convinit.init_vit_(model, method="scrambled")


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


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "sgd"}, "method must be one of newton"),
        ({"values": "all"}, "values must be"),
        ({"peak": 1.0}, r"peak must lie in \(0, 1\)"),
        ({"peak": 0.5, "weight_norm": 3.0}, "not both"),
        ({"alpha": 0}, "alpha must be above 0"),
        ({"pos_embed_gain": -1}, "pos_embed_gain must lie"),
        ({"layers": 7}, "layers must lie in 0 to 2"),
        ({"layers": []}, "at least one"),
        ({"offsets": torch.zeros(4, 2).long()}, r"offsets must be \[9, 2\]"),
        ({"offsets": "fixed", "kernel_size": 5}, "kernel_size must be 3"),
        ({"pos_embed": torch.zeros(4, 48)}, "together"),
        ({"grid_size": (8, 7)}, "H·W = 64"),
        ({"padding_mode": "wrap", "pos_embed_gain": 5.0}, "padding_mode must be"),
        ({"method": "svd", "peak": 0.5, "pos_embed_gain": 5.0}, "peak must be None"),
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
        convinit.init_vit_(model)
    with pytest.raises(ValueError, match="biases on queries and keys"):
        convinit.init_vit_(timm_rope(qkv_bias=False))
    with pytest.raises(ValueError, match="pos_embed_gain must be None"):
        convinit.init_vit_(timm_rope(), pos_embed_gain=18)
