from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

import convinit.nn.spatial_conv
from convinit import impulse_targets
from convinit.init import query_key
from convinit.models import ConvMixer, SimpleViT
from convinit.nn import SpatialConv
from convinit.offsets import attention_on_targets

VARIANTS = ["vanilla", "I", "II", "III"]
VIT = {"dim": 32, "depth": 2, "num_heads": 4, "head_dim": 8, "mlp_dim": 24, "kernel_size": 3}
MIXER = {"dim": 12, "depth": 3, "kernel_size": 3}
KINDS = [
    {},
    {"method": "impulse", "trainable_mixing": False},
    {"method": "box", "num_cells": 4, "num_filters": 5},
    {"method": "gaussian", "variance": 0.5, "share_layers": True},
    {"method": "softmax", "num_filters": 4, "share_layers": True, "trainable_mixing": False},
    {"method": "impulse", "matrix_form": True},
    {"method": "permutation", "matrix_form": True, "num_filters": 3, "trainable_mixing": False},
    {"method": "full_permutation", "matrix_form": True, "num_filters": 3, "share_layers": True},
]


def vit(seed=0, **options):
    return SimpleViT((8, 12), 2, 5, generator=torch.Generator().manual_seed(seed), **VIT | options)


def mixer(seed=0, **options):
    return ConvMixer((8, 12), 2, 5, generator=torch.Generator().manual_seed(seed), **MIXER | options)


def images(batch=3):
    return torch.randn(batch, 3, 8, 12, generator=torch.Generator().manual_seed(1))


MODELS = [*((vit, {"variant": v}) for v in VARIANTS), *((mixer, kind) for kind in KINDS)]


@pytest.mark.parametrize(("make", "options"), MODELS)
def test_trains_copies_and_resets(make, options):
    model = make(**options)
    fresh = copy.deepcopy(model)
    assert model(images()).shape == (3, 5)

    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert bool(frozen) == (not options.get("trainable_mixing", True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(model(images()), torch.tensor([0, 1, 2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in frozen.items())

    model.eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), make(seed=9, **options).eval()):
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(images()), model(images()))

    model.reset_parameters(torch.Generator().manual_seed(0))
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("make", "options"), [MODELS[1], (mixer, KINDS[3]), (mixer, KINDS[7])])
def test_meta_then_to_empty_then_reset(make, options):
    model = make(device="meta", **options).to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(77)
    model.reset_parameters(torch.Generator().manual_seed(0))
    expected = make(**options)
    assert torch.equal(model(images()), expected(images()))
    assert len(list(model.parameters())) == len(list(expected.parameters()))


def test_seeds_and_the_global_generator():
    state = torch.get_rng_state()
    for make in (vit, mixer):
        one, same, other = make(0).state_dict(), make(0).state_dict(), make(1).state_dict()
        assert all(torch.equal(one[key], same[key]) for key in one)
        assert not all(torch.equal(one[key], other[key]) for key in one)
    assert torch.equal(torch.get_rng_state(), state)


# --- SimpleViT --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["impulse", "scrambled", "norm_matched"])
def test_one_fit_serves_all_layers(method, monkeypatch):
    calls = []

    def spy(pos_embed, offsets, *args, **kwargs):
        calls.append(len(offsets))
        return fit_qk(pos_embed, offsets, *args, **kwargs)

    fit_qk = query_key.fit_qk
    monkeypatch.setattr(query_key, "fit_qk", spy)
    model = vit(method=method)
    assert calls == [8]
    assert not torch.equal(model.blocks[0].attn.qkv.weight, model.blocks[1].attn.qkv.weight)


def test_position_enters_where_the_variant_says():
    for variant in VARIANTS:
        model = vit(variant=variant, depth=1, alpha=0.3, method="random")
        content = model.patch_embed(model.patchify(images()))
        entry = 0.3 * content + 0.7 * model.pos_embed if variant == "vanilla" else content
        torch.testing.assert_close(model.embed(images()), entry)
        attn = model.blocks[0].attn
        torch.testing.assert_close(
            model.attention_maps(images())[0],
            attn.attention_map(model.blocks[0].norm(entry)).expand(3, -1, -1, -1),
        )


def test_options_of_the_papers_code():
    """P = I, P at the entry of Models II and III, and one fit for all layers."""
    model = vit(variant="II", pos_embed="identity", method="impulse", kernel_size=3, dim=32, alpha=0.25,
                input_pos_embed=True, layers_alike=True)  # fmt: skip
    tokens = model.grid_size[0] * model.grid_size[1]
    assert torch.equal(model.pos_embed, torch.eye(tokens, 32))
    assert torch.equal(model.blocks[0].attn.pos_embed, model.pos_embed)
    x = model.patch_embed(model.patchify(images()))
    torch.testing.assert_close(model.embed(images()), 0.25 * x + 0.75 * torch.eye(tokens, 32))
    (first, second), target = [block.attn for block in model.blocks[:2]], 0.7
    assert torch.equal(first.offsets, second.offsets)
    for a, b in zip(first.qk_weights(), second.qk_weights(), strict=True):
        assert torch.equal(a, b)
    maps = first.attention_map()[0]
    assert attention_on_targets(maps, first.offsets, model.grid_size) == pytest.approx(target, abs=0.02)
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(images()), model(images()))
    for options, message in (
        ({"variant": "I", "input_pos_embed": True}, "input_pos_embed must be False for variant 'I'"),
        ({"pos_embed": "identity", "dim": 16, "num_heads": 2, "head_dim": 8}, "dim must be at least N = 24"),
        ({"pos_embed": "learned"}, "pos_embed must be one of sincos, identity"),
    ):
        with pytest.raises(ValueError, match=message):
            vit(**options)


def test_attention_maps_of_model_two_are_the_impulses():
    model = vit(variant="II", peak=0.9)
    maps = model.attention_maps(images(2))  # [depth, B, heads, N, N]
    assert maps.shape == (2, 2, 4, 24, 24)
    for layer, block in zip(maps, model.blocks, strict=True):
        targets = impulse_targets(block.attn.offsets, (4, 6))
        assert (layer[0].argmax(dim=2) == targets)[targets >= 0].all()


def test_patches_are_row_major():
    model = SimpleViT((4, 6), (2, 3), 2, channels=1, dim=8, depth=0)
    patches = model.patchify(torch.arange(24.0).view(1, 1, 4, 6))[0]
    assert patches.tolist()[1] == [3, 4, 5, 9, 10, 11]
    assert patches.tolist()[2] == [12, 13, 14, 18, 19, 20]


def test_a_patch_of_one_number_is_not_normalised_away():
    model = SimpleViT(4, 1, 2, channels=1, dim=8, depth=1, num_heads=2, head_dim=4, kernel_size=3)
    one, other = model(torch.rand(2, 1, 4, 4))
    assert not torch.allclose(one, other)


def test_parameters_of_the_papers_model():
    model = SimpleViT(32, 2, 10, method="default", device="meta")
    attention, mlp, norms = 4 * 512 * 512, 2 * 512 * 512 + 2 * 512, 4 * 512
    patch = 24 + (12 + 1) * 512 + 1024
    assert sum(p.numel() for p in model.parameters()) == 6 * (attention + mlp + norms) + patch + 1024 + 5130


# --- ConvMixer --------------------------------------------------------------------------------------------


def test_learned_mixer_is_made_of_torch_layers():
    model = mixer(depth=1).eval()
    block = model.blocks[0]
    x = model.patch_embed(images())
    conv = F.conv2d(x, block.spatial.weight, block.spatial.bias, padding=1, groups=12)
    x = x + block.spatial_norm[1](F.gelu(conv))
    x = block.pointwise[2](F.gelu(block.pointwise[0](x)))
    torch.testing.assert_close(model(images()), model.head(x.mean(dim=(2, 3))))


def test_shared_layers_have_one_weight_and_their_own_assignment():
    model = mixer(method="impulse", num_filters=4, share_layers=True)
    first, second, _ = (block.spatial for block in model.blocks)
    assert first.weight is second.weight and first.weight.shape == (4, 1, 3, 3)
    assert not torch.equal(first.assignment, second.assignment)
    assert first.bias is not second.bias


def test_shared_filters_are_dealt_anew_in_each_layer():
    """Without replacement, and in each layer in another order, also where every channel has a filter."""
    for num_filters, channels in ((None, {1}), (12, {1}), (5, {2, 3})):
        model = mixer(method="impulse", num_filters=num_filters, share_layers=True)
        dealt = [block.spatial.assignment for block in model.blocks]
        for assignment in dealt:
            assert {*assignment.bincount(minlength=num_filters or 12).tolist()} == channels
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(dealt, 2))


def test_spatial_mixing_of_the_papers_code():
    """arXiv 2401.12511 has no GELU there, and an option without bias; 2404.01139 has the gain √(1/f)."""
    options = {"spatial_gelu": False, "spatial_bias": False, "gain": 5**-0.5, "kernel_size": 5, "depth": 1}
    model = mixer(method="impulse", **options).eval()
    block = model.blocks[0]
    assert block.spatial.bias is None and block.spatial.weight.max().item() == pytest.approx(0.4472, abs=1e-4)
    x = model.patch_embed(images())
    conv = F.conv2d(x, block.spatial.weight, padding=2, groups=12)
    x = block.pointwise(x + block.spatial_norm[1](conv))
    torch.testing.assert_close(model(images()), model.head(x.mean(dim=(2, 3))))
    box = mixer(method="box", num_cells=25, **options).blocks[0].spatial.weight
    torch.testing.assert_close(box, torch.full_like(box, 125**-0.5))  # "box25": all cells alike
    matrix = mixer(method="impulse", matrix_form=True, **options).blocks[0].spatial.weight
    assert matrix.max().item() == pytest.approx(0.4472, abs=1e-4)
    with pytest.raises(ValueError, match="kernel_size must be odd, so that the window has a centre"):
        mixer(method="impulse", matrix_form=True, kernel_size=4)
    with pytest.raises(ValueError, match="gain must be"):
        mixer(method="impulse", gain=-1.0)


def test_matrix_form_of_the_impulse_is_the_filter():
    options = {"bias": True, "generator": torch.Generator().manual_seed(0)}
    matrix = SpatialConv(6, 3, method="impulse", grid_size=(4, 5), **options)
    filters = SpatialConv(6, 3, method="impulse")
    with torch.no_grad():
        filters.bias.copy_(matrix.bias)
        filters.weight.zero_()
        for channel in range(6):  # row of an inner pixel: its impulse's place relative to the pixel
            dy, dx = divmod(int(matrix.weight[channel, 6].argmax()), 5)
            filters.weight[channel, 0, dy, dx] = math.sqrt(1 / 3)
    x = torch.randn(2, 6, 4, 5)
    torch.testing.assert_close(matrix(x), filters(x))


def test_channels_take_their_assigned_filter():
    x = torch.randn(2, 6, 4, 5)
    for options in ({"method": "softmax"}, {"method": "permutation", "grid_size": (4, 5)}):
        shared = SpatialConv(6, 3, num_filters=2, **options)
        own = SpatialConv(6, 3, **options)
        with torch.no_grad():
            own.weight.copy_(shared.weight[shared.assignment])
            own.bias.copy_(shared.bias)
        torch.testing.assert_close(shared(x), own(x))


def test_softmax_filters_stay_distributions():
    conv = SpatialConv(3, 3, method="softmax", bias=False)
    torch.nn.init.normal_(conv.weight, std=3.0)
    torch.testing.assert_close(conv(torch.ones(1, 3, 5, 5))[:, :, 1:-1, 1:-1], torch.ones(1, 3, 3, 3))


@pytest.mark.parametrize("num_filters", [None, 4])
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, 5])
def test_filters_are_a_depthwise_convolution(kernel_size, num_filters):
    conv = SpatialConv(20, kernel_size, method="impulse", num_filters=num_filters, trainable=False)
    x = torch.randn(2, 20, 6, 7)
    weight = conv.weight if conv.assignment is None else conv.weight[conv.assignment]
    expected = F.conv2d(x, weight, conv.bias, padding="same", groups=20)
    torch.testing.assert_close(conv(x), expected)
    if num_filters is None and kernel_size % 2:  # an impulse filter is a shift
        rows, columns = (
            weight.flatten(1).argmax(dim=1) // kernel_size,
            weight.flatten(1).argmax(dim=1) % kernel_size,
        )
        offsets = torch.stack([rows, columns], dim=1) - kernel_size // 2
        shifted = convinit.impulse_conv(x, offsets, weight.flatten(1).amax(dim=1), conv.bias)
        torch.testing.assert_close(expected, shifted)


def test_spatial_conv_gradcheck():
    conv = SpatialConv(2, 3, method="full_permutation", grid_size=(2, 2), num_filters=1, dtype=torch.float64)
    x = torch.randn(2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w, b: torch.func.functional_call(conv, {"weight": w, "bias": b}, x),
        (x, conv.weight, conv.bias),
    )


def test_compiles_into_one_graph():
    for model in (vit(variant="vanilla"), mixer(method="softmax", num_filters=3).eval()):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images()), model(images()))


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SimpleViT(32, 5, 10), "image_size must be divisible by patch_size"),
        (lambda: ConvMixer((32, 30), 4, 10), "image_size must be divisible by patch_size"),
        (lambda: SimpleViT(8, 2, 10, dim=30, num_heads=5, head_dim=8), "dim must be a multiple of 4"),
        (
            lambda: SimpleViT(8, 2, 10, dim=32, num_heads=5, head_dim=None),
            "dim must be divisible by num_heads",
        ),
        (lambda: vit(method="implus"), "method must be one of"),
        (lambda: vit()(torch.zeros(1, 3, 8, 8)), r"images must be \[B, 3, 8, 12\]"),
        (lambda: mixer()(torch.zeros(1, 3, 8, 8)), r"images must be \[B, 3, 8, 12\]"),
        (lambda: mixer(method="permutation"), "method of the filter form"),
        (lambda: mixer(method="box", matrix_form=True), "method of the matrix form"),
        (lambda: mixer(num_filters=13), "num_filters must be at most dim = 12"),
        (lambda: mixer(method="box", num_cells=10), "num_cells must be at most 9"),
        (lambda: SpatialConv(6, 3, weight=torch.nn.Parameter(torch.zeros(5, 1, 3, 3))), "weight must be"),
        (
            lambda: SpatialConv(6, 3, method="permutation", grid_size=(2, 2))(torch.zeros(1, 6, 4, 1)),
            r"x must be \[B, 6, 2, 2\]",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_offsets_for_all_layers_alike_or_each():
    options = {"dim": 16, "depth": 2, "num_heads": 2, "head_dim": 8, "mlp_dim": 16}
    two, four = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0, 1], [1, 0], [0, 0], [-1, 0]])
    for offsets in (two, four):
        model = SimpleViT(4, 1, 3, offsets=offsets, **options)
        expected = two if offsets is two else four[2:]
        assert torch.equal(model.blocks[1].attn.offsets, expected)
    with pytest.raises(ValueError, match=r"offsets must be \[2, 2\].*or \[4, 2\], got \[3, 2\]"):
        SimpleViT(4, 1, 3, offsets=four[:3], **options)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SimpleViT(4, 1, 3, dim=16, depth=2, num_heads=2, head_dim=8, mlp_dim=16),
        lambda: ConvMixer(4, 1, 3, dim=8, depth=2, kernel_size=3, share_layers=True),
    ],
)
def test_state_loads_into_a_model_that_was_on_the_meta_device(make):
    source = make().eval()
    with torch.device("meta"):
        model = make()
    model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    images = torch.randn(2, 3, 4, 4)
    assert torch.equal(model.eval()(images), source(images))
    assert len(list(model.parameters())) == len(list(source.parameters()))


@pytest.mark.parametrize("size", [(3, 32, 32), 32.0, "32"])
def test_image_size_errors(size):
    with pytest.raises((TypeError, ValueError), match="image_size must be an int or a pair"):
        SimpleViT(size, 4, 10)
