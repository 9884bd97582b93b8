from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convinit import fit_qk, impulse_targets, sample_offsets
from convinit.fit import Adam
from convinit.nn import ConvInitAttention, sincos_2d
from convinit.nn._linear import Linear
from convinit.nn.attention import reset_mixing_

DIM, HEADS, GRID, TOKENS = 32, 4, (4, 5), 20
VARIANTS = ["vanilla", "I", "II", "III"]
INITS = ["impulse", "scrambled", "norm_matched", "mimetic", "random", "default"]


def make(variant="I", seed=0, **options):
    options = {"method": "random"} | options
    return ConvInitAttention(
        DIM, HEADS, GRID, variant=variant, generator=torch.Generator().manual_seed(seed), **options
    )


def tokens(batch=2, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return torch.randn(batch, TOKENS, DIM, generator=g, dtype=torch.float64).to(dtype)


def split_heads(x):
    return x.unflatten(2, (HEADS, -1)).transpose(1, 2)


def papers_attention(module, x):
    """The formulas of the papers: mix first, then one projection each for queries, keys and values."""

    def projection(layer, start, stop):
        inner = HEADS * module.head_dim
        rows = slice(start * inner, stop * inner)
        return lambda y: split_heads(
            F.linear(y, layer.weight[rows], None if layer.bias is None else layer.bias[rows])
        )

    if module.variant == "III":
        logits = module.q_map @ module.k_map
    else:
        layer = module.qk if module.qkv is None else module.qkv
        share = {"vanilla": 1.0, "I": module.alpha, "II": 0.0}[module.variant]
        y = share * x + (1 - share) * module.pos_embed
        logits = projection(layer, 0, 1)(y) @ projection(layer, 1, 2)(y).mT
    if module.qkv is not None:
        v = projection(module.qkv, 2, 3)(x)
    else:
        v = split_heads(x) if module.v is None else projection(module.v, 0, 1)(x)
    return module.proj(((module.scale * logits).softmax(dim=-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qkv_bias": True, "head_dim": 6, "scale": 0.11, "alpha": 0.7, "method": "default"},
        {"trainable_mixing": False, "qkv_bias": True, "method": "default"},
        {"value": False, "proj": False},
    ],
    ids=["plain", "biases", "frozen", "bare"],
)
def test_equals_the_papers_formula_in_value_and_gradients(variant, options):
    module = make(variant, dtype=torch.float64, **options)

    def run(f):
        x = tokens(3, torch.float64).requires_grad_()
        out = f(x)
        inputs = [x, *(p for p in module.parameters() if p.requires_grad)]
        return out, *torch.autograd.grad(out.sin().sum(), inputs)

    for ours, papers in zip(run(module), run(lambda x: papers_attention(module, x)), strict=True):
        torch.testing.assert_close(ours, papers, rtol=1e-10, atol=1e-12)


def test_gradcheck():
    module = ConvInitAttention(4, 1, (2, 2), method="random", qkv_bias=True, dtype=torch.float64)
    names, parameters = zip(*module.named_parameters(), strict=True)
    x = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)

    def f(x, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(f, (x, *parameters))


# --- initial values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_impulse_maps_look_at_their_offset(variant):
    module = make(variant, method="impulse", peak=0.9, kernel_size=3)
    targets = impulse_targets(module.offsets, GRID)
    # What the fit saw: LayerNorm(P) in the vanilla variant, whose tokens come out of a norm; else P alone.
    position = torch.zeros(TOKENS, DIM)
    if variant == "vanilla":
        position = F.layer_norm(module.pos_embed, (DIM,))
    attention = module.attention_map(position.unsqueeze(0))[0]
    for head, target in zip(attention, targets, strict=True):
        inside = target >= 0
        assert abs(head[inside, target[inside]].mean().item() - 0.9) < 0.02
        assert (head.argmax(dim=1) == target)[inside].all()


@pytest.mark.parametrize("method", INITS)
@pytest.mark.parametrize("variant", ["I", "III"])
def test_every_init_is_idempotent_and_pairs_offsets(variant, method):
    options = {"method": method, "values": "mimetic", "qkv_bias": True, "kernel_size": 3}
    module = make(variant, **options)
    drawn = copy.deepcopy(module.state_dict())
    module.reset_parameters(torch.Generator().manual_seed(5))
    name = "q_map" if variant == "III" else "qkv.weight"
    assert not torch.equal(module.state_dict()[name], drawn[name])
    module.reset_parameters(torch.Generator().manual_seed(0))
    assert all(torch.equal(value, drawn[key]) for key, value in module.state_dict().items())
    assert torch.equal(module.offsets, make(variant, method="random", kernel_size=3).offsets)
    assert module(tokens()).isfinite().all()


def test_controls_have_the_weight_norm_of_the_fit():
    def norms(module):
        wq, wk = module.qk_weights()
        return (wq.norm(dim=(1, 2)) * wk.norm(dim=(1, 2))).sqrt()

    fitted = norms(make(method="impulse", peak=0.8))
    for init in ("scrambled", "norm_matched"):
        torch.testing.assert_close(norms(make(method=init, peak=0.8)), fitted, rtol=1e-4, atol=0)


def test_free_maps_start_as_the_projected_ones():
    options = {"method": "impulse", "weight_norm": 8.0, "scale": 0.3}
    projected, free = make("II", **options), make("III", **options)
    torch.testing.assert_close(free.attention_map(), projected.attention_map(), rtol=1e-4, atol=1e-5)
    assert torch.equal(free.v.weight, projected.v.weight)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_the_papers_adam_sees_what_its_code_gives_it(alpha):
    """P itself in Model I, whatever alpha is; in Model III nothing: Q and K are the fit of free factors."""
    adam, offsets = Adam(steps=20), torch.tensor([[0, 1], [1, 0], [0, 0], [-1, -1]])
    options = {"method": "impulse", "fit": adam, "scale": 0.1, "offsets": offsets, "kernel_size": 3}
    for variant, P in (("I", sincos_2d(GRID, DIM)), ("III", torch.eye(TOKENS))):
        module = make(variant, alpha=alpha, **options)
        seeded = torch.Generator().manual_seed(0)
        sample_offsets(HEADS, 3, stratified=True, generator=seeded)  # drawn first, whatever is given
        fit = fit_qk(P, offsets, GRID, DIM // HEADS, scale=0.1, fit=adam, generator=seeded)
        wq, wk = module.qk_weights() if variant == "I" else (module.q_map, module.k_map.mT)
        torch.testing.assert_close(wq, fit.wq)
        torch.testing.assert_close(wk, fit.wk)
        assert torch.equal(module.offsets, offsets)


def test_mimetic_and_random_are_those_of_the_papers_code():
    """D 512, 8 heads of 64, 16 × 16 tokens: figures measured in the authors' code, and of noise N(0, 1/D)."""

    def layer(init, variant="I", heads=8, **options):
        seeded = torch.Generator().manual_seed(0)
        return ConvInitAttention(
            512, heads, (16, 16), head_dim=64, variant=variant, method=init, generator=seeded, **options
        )

    for distribution, diagonal, norm in (("uniform", 0.1407, 8.758), ("normal", 0.172, 10.15)):
        wq, wk = layer("mimetic", distribution=distribution).qk_weights()
        assert (wq * wk).sum(dim=2).mean().item() == pytest.approx(diagonal, rel=0.01)
        assert wq.flatten(1).norm(dim=1).mean().item() == pytest.approx(norm, rel=0.003)
    for weights in (layer("random").qk_weights(), layer("random", heads=4).qk_weights()):
        assert weights[0].abs().max().item() == pytest.approx(512**-0.5, rel=1e-3)  # 0.0442
    assert layer("random", "III").q_map.abs().max().item() == pytest.approx(0.0625, rel=1e-3)


def test_values_and_output_are_mimetic():
    module = make(values="mimetic", qkv_bias=True)
    product = module.qkv.weight[-DIM:].mT @ module.proj.weight.mT
    assert abs(product.diagonal().mean().item() + 0.4) < 0.1
    assert not module.qkv.bias.any() and not module.proj.bias.any()


def test_default_starts_as_linear():
    module = make(method="default", values="default", qkv_bias=True)
    for parameter in (module.qkv.weight, module.qkv.bias, module.proj.weight, module.proj.bias):
        bound = DIM**-0.5
        assert 0.9 * bound < parameter.abs().max() <= bound


def test_explicit_scale_is_honoured_by_fit_and_forward():
    for scale in (0.1, 1.0):
        module = make("II", method="impulse", scale=scale, peak=0.8, kernel_size=3)
        logits = torch.log(module.attention_map()[0])
        q, k = F.linear(module.pos_embed, module.qk.weight).view(TOKENS, 2, HEADS, -1).permute(1, 2, 0, 3)
        expected = F.log_softmax(scale * q @ k.mT, dim=-1)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        targets = impulse_targets(module.offsets, GRID)[0]
        inside = targets >= 0
        assert abs(module.attention_map()[0, 0][inside, targets[inside]].mean().item() - 0.8) < 0.02
    assert make(head_dim=16).scale == 0.25


def test_set_qk():
    wq, wk = torch.randn(2, HEADS, DIM, 8)
    offsets = torch.ones(HEADS, 2, dtype=torch.int64)
    module = make(method="default", values="default", qkv_bias=True).set_qk_(wq, wk, offsets)
    assert torch.equal(module.qk_weights()[0], wq) and torch.equal(module.qk_weights()[1], wk)
    assert torch.equal(module.offsets, offsets)
    assert not module.qkv.bias[: 2 * DIM].any() and module.qkv.bias[2 * DIM :].all()
    with pytest.raises(ValueError, match="wq and wk must be"):
        module.set_qk_(wq[:1], wk)
    with pytest.raises(ValueError, match="offsets must be"):
        module.set_qk_(wq, wk, offsets[:1])


def test_own_position_embedding():
    position = nn.functional.layer_norm(torch.randn(TOKENS, DIM), (DIM,))
    module = make("II", method="impulse", peak=0.9, kernel_size=3, pos_embed=position)
    assert torch.equal(module.pos_embed, position) and "pos_embed" in module.state_dict()
    targets = impulse_targets(module.offsets, GRID)
    hits = (module.attention_map()[0].argmax(dim=2) == targets)[targets >= 0]
    assert hits.double().mean() > 0.95


def test_frozen_mixing_does_not_train():
    for variant in VARIANTS:
        module = make(variant, trainable_mixing=False)
        frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
        assert frozen == ({"q_map", "k_map"} if variant == "III" else {"qk.weight"})
        before = module.attention_map(tokens())
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.5)
        module(tokens()).square().sum().backward()
        optimizer.step()
        assert torch.equal(module.attention_map(tokens()), before)
        assert module.proj.weight.grad.any()


# --- life of a module -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_meta_then_to_empty_then_reset(variant):
    module = ConvInitAttention(
        DIM, HEADS, GRID, variant=variant, method="impulse", kernel_size=3, device="meta"
    )
    assert all(t.is_meta for t in (*module.parameters(), *module.buffers()))
    module.to_empty(device="cpu")
    module.pos_embed.fill_(float("nan"))
    module.reset_parameters(torch.Generator().manual_seed(0))
    expected = make(variant, method="impulse", kernel_size=3)
    assert torch.equal(module.pos_embed, expected.pos_embed)
    torch.testing.assert_close(module(tokens()), expected(tokens()), rtol=0, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_copies(variant):
    module = make(variant)
    loaded = make(variant, seed=7)
    assert loaded.load_state_dict(module.state_dict()) is not None
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert torch.equal(other(tokens()), module(tokens()))
        assert torch.equal(other.offsets, module.offsets)


def test_draws_come_from_the_given_generator_alone():
    torch.manual_seed(0)
    module = ConvInitAttention(DIM, HEADS, GRID, method="random")
    expected = make(method="random")
    assert torch.equal(module.qkv.weight, expected.qkv.weight)
    state = torch.get_rng_state()
    make(method="impulse", values="mimetic")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast(variant, value):
    module, x = make(variant, qkv_bias=True, value=value), tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
        out.square().sum().backward()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), module(x), rtol=0.05, atol=0.02)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_into_one_graph(variant):
    module = make(variant, qkv_bias=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = tokens().requires_grad_()
    (ours,) = torch.autograd.grad(compiled(x).sin().sum(), x)
    (expected,) = torch.autograd.grad(module(x).sin().sum(), x)
    torch.testing.assert_close(ours, expected)


def test_given_offsets_are_kept():
    offsets = torch.tensor([[0, 1], [1, 0], [-1, 0], [0, 0]])
    module = make("II", method="impulse", offsets=offsets)
    module.reset_parameters(torch.Generator().manual_seed(5))
    assert torch.equal(module.offsets, offsets)
    targets = impulse_targets(offsets, GRID)
    assert (module.attention_map()[0].argmax(-1) == targets)[targets >= 0].all()
    with pytest.raises(ValueError, match=r"offsets must be \[4, 2\]"):
        make("II", method="impulse", offsets=offsets[:3])


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_loads_into_a_module_that_was_on_the_meta_device(variant):
    source = make(variant, method="impulse")
    with torch.device("meta"):
        module = make(variant, method="impulse")
    module.to_empty(device="cpu")
    module.pos_embed.fill_(float("nan"))
    module.load_state_dict(source.state_dict())
    assert torch.equal(module.pos_embed, source.pos_embed)
    assert torch.equal(module(tokens()), source(tokens()))


def test_papers_adam_is_fitted_layer_by_layer():
    """Its first weights depend on the heads of a layer, and so not on how many layers are drawn together."""
    layers = [make(method="impulse", fit=Adam(steps=1)) for _ in range(6)]
    alone = layers[0].qk_weights()[0].norm()
    reset_mixing_(layers, torch.Generator().manual_seed(0))
    torch.testing.assert_close(layers[0].qk_weights()[0].norm(), alone, rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_drop": 1.5}, "attn_drop must be at least 0 and below 1"),
        ({"head_dim": 64, "method": "impulse"}, "head_dim must be at most dim = 32"),
        (
            {"head_dim": 24, "method": "mimetic", "variant": "III"},
            "head_dim must be at most tokens of grid_size = 20",
        ),
    ],
)
def test_option_errors(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_dropout_in_training_alone():
    for variant in ("I", "III"):
        module = make(variant, attn_drop=0.5, proj_drop=0.5)
        assert not torch.equal(module(tokens()), module(tokens()))
        module.eval()
        assert torch.equal(module(tokens()), make(variant).eval()(tokens()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_map_is_the_map_of_the_forward_pass(variant):
    module, x = make(variant, value=False, proj=False), tokens(3)
    attention = module.attention_map(x)
    assert attention.shape == (3, HEADS, TOKENS, TOKENS)
    expected = (attention @ split_heads(x)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module(x), expected)
    if variant in ("II", "III"):
        assert module.attention_map().shape == (1, HEADS, TOKENS, TOKENS)
    else:
        with pytest.raises(ValueError, match="x must be given"):
            module.attention_map()


def test_empty_batch():
    for variant in VARIANTS:
        assert make(variant)(tokens(0)).shape == (0, TOKENS, DIM)


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "IV"}, "variant must be one of vanilla, I, II, III"),
        ({"method": "impulses"}, "method must be one of impulse"),
        ({"values": "random"}, "values must be one of"),
        ({"padding_mode": "same"}, "padding_mode must be one of"),
        ({"alpha": 1.5}, "alpha must be 0 to 1"),
        ({"alpha": 1.0, "method": "impulse"}, "alpha must be below 1"),
        ({"scale": -0.1}, "scale must be positive and finite"),
        ({"value": False, "head_dim": 16}, "value and proj must both be True"),
        ({"method": "mimetic", "peak": 0.5}, "peak must be None with method='mimetic'"),
        (
            {"method": "impulse", "fit": "svd", "weight_norm": 5.0},
            "weight_norm must be None with .* fit='svd'",
        ),
        ({"method": "impulse", "peak": 0.5, "weight_norm": 5.0}, "weight_norm or peak, not both"),
        ({"method": "position_only"}, '"default" is that control'),
        ({"offsets": "drawn"}, 'offsets must be None, "random", "fixed" or a tensor'),
        ({"offsets": "fixed", "kernel_size": 5}, "kernel_size must be 3 with"),
        ({"pos_embed": torch.zeros(TOKENS, 8)}, r"pos_embed must be \[20, 32\]"),
        ({"kernel_size": 4}, "kernel_size must be odd"),
        ({"qk_norm": True}, "qk_norm must be False"),
        ({"scale_norm": True}, "scale_norm must be False"),
        ({"dim_out": 8}, "dim_out must be None"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_bad_shapes():
    with pytest.raises(ValueError, match="dim must be divisible by num_heads"):
        ConvInitAttention(32, 5, GRID)
    with pytest.raises(ValueError, match="dim must be a multiple of 4"):
        ConvInitAttention(30, 5, GRID)
    module = make()
    with pytest.raises(ValueError, match="without a class token, got .*21, 32"):
        module(torch.zeros(2, TOKENS + 1, DIM))
    with pytest.raises(ValueError, match="attn_mask must be None"):
        module(tokens(), attn_mask=torch.ones(TOKENS, TOKENS))
    with pytest.raises(ValueError, match="no query and key weights"):
        make("III").qk_weights()


# --- position embedding -----------------------------------------------------------------------------------


def test_sincos_layout():
    position = sincos_2d((3, 4), 16, dtype=torch.float64).view(3, 4, 4, 4)
    for i, j, k in [(0, 0, 0), (2, 1, 0), (1, 3, 2), (2, 3, 3)]:
        omega = 10000 ** -torch.tensor(k / 3, dtype=torch.float64)
        expected = torch.stack([(j * omega).sin(), (j * omega).cos(), (i * omega).sin(), (i * omega).cos()])
        torch.testing.assert_close(position[i, j, :, k], expected)


def test_sincos_of_dim_four_has_frequency_one():
    x = torch.arange(3.0)
    expected = torch.stack([x.sin(), x.cos(), torch.zeros(3), torch.ones(3)], dim=1)
    torch.testing.assert_close(sincos_2d((1, 3), 4), expected)


@pytest.mark.parametrize(("grid", "dim", "message"), [((2, 2), 6, "multiple of 4"), ((0, 2), 8, "grid_size")])
def test_sincos_bad_input(grid, dim, message):
    with pytest.raises(ValueError, match=message):
        sincos_2d(grid, dim)


def test_tensors_on_the_meta_device_beside_real_ones_are_refused(generator):
    """PyTorch multiplies with them and returns memory that nobody wrote."""
    x = torch.randn(1, 9, 8, generator=generator)
    for variant in ("I", "II"):
        layer = ConvInitAttention(8, 2, (3, 3), kernel_size=3, variant=variant, generator=generator)
        layer.pos_embed = layer.pos_embed.to("meta")
        with pytest.raises(ValueError, match="pos_embed must be on the device of the layer's weights, cpu"):
            layer(x)
    with pytest.raises(ValueError, match="x must be on the device of the weight, meta, got cpu"):
        Linear(8, 4, device="meta")(x)
    assert ConvInitAttention(8, 2, (3, 3), kernel_size=3, device="meta")(x.to("meta")).shape == x.shape


class LowRankAdapter(nn.Module):
    """As those that are put around a layer to tune it: weight and bias are those of the layer within."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(4, base.in_features) * 0.2)
        self.up = nn.Parameter(torch.randn(base.out_features, 4) * 0.2)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("variant, name", [("vanilla", "qkv"), ("I", "qkv"), ("II", "qk")])
def test_the_position_goes_through_the_layer_itself(variant, name):
    """An adapter merged into its layer changes nothing, neither the output nor the maps."""
    torch.manual_seed(0)
    attn = ConvInitAttention(32, 4, (4, 4), variant=variant)
    adapter = LowRankAdapter(getattr(attn, name))
    setattr(attn, name, adapter)
    x = torch.randn(2, 16, 32)
    before, maps = attn(x), attn.attention_map(x)
    with torch.no_grad():
        adapter.base.weight += adapter.up @ adapter.down
    setattr(attn, name, adapter.base)
    torch.testing.assert_close(attn(x), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(attn.attention_map(x), maps, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["qkv", "proj"])
def test_weights_that_another_module_computes_are_not_drawn(part):
    attn = ConvInitAttention(32, 4, (4, 4))
    nn.utils.parametrizations.weight_norm(getattr(attn, part))
    with pytest.raises(ValueError, match="computed by another module"):
        attn.reset_parameters()
