from __future__ import annotations

import math

import pytest
import torch

from convinit import init, sample_offsets
from convinit.fit.result import map_metrics
from convinit.fit.rotary import RotaryImpulse, best_for_total

GRID = (14, 14)


def axial(grid=GRID, pairs=32, theta=100.0):
    """Angles [N, pairs]: half of the pairs turn with the row, half with the column."""
    frequency = theta ** (-torch.arange(pairs // 2) / (pairs // 2))
    y, x = torch.meshgrid(*(torch.arange(float(s)) for s in grid), indexing="ij")
    return torch.cat([y.reshape(-1, 1) * frequency, x.reshape(-1, 1) * frequency], dim=1)


def biases(heads, rank=64):
    return torch.full((2, heads, rank), torch.nan).unbind(0)


def attention_by_matrices(bq, bk, angles, scale, layout):
    """Token by token and pair by pair, each turned by a 2 × 2 matrix, in float64."""
    heads, rank = bq.shape
    pairs = angles.shape[-1]
    first = torch.arange(pairs) * (2 if layout == "interleaved" else 1)
    second = first + (1 if layout == "interleaved" else pairs)
    c, s = angles.double().cos(), angles.double().sin()
    turned = []
    for b in (bq.double(), bk.double()):
        out = b[:, None].repeat(1, angles.shape[-2], 1)
        one, two = b[:, None, first], b[:, None, second]
        out[..., first], out[..., second] = c * one - s * two, s * one + c * two
        turned.append(out)
    return torch.softmax(scale * turned[0] @ turned[1].mT, dim=-1)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("pairs", [32, 20])
def test_biases_make_the_impulse_and_the_report_is_true(generator, layout, pairs):
    grid, angles = (9, 14), axial((9, 14), pairs)
    offsets = torch.cat([sample_offsets(5, 5, generator=generator), torch.tensor([[-3, 4]])])
    bq, bk = biases(6)
    fit = init.rotary_impulse_qk_(
        bq, bk, angles, offsets, grid, scale=0.125, peak=0.8, pairs=layout, generator=generator
    )
    attention = attention_by_matrices(bq, bk, angles, 0.125, layout)
    torch.testing.assert_close(fit.attention_map(), attention, rtol=1e-4, atol=1e-7)
    metrics = map_metrics(attention, fit.targets)
    torch.testing.assert_close(
        torch.stack([fit.mse, fit.peak, fit.hit_rate]), torch.stack(metrics), rtol=1e-4, atol=1e-7
    )
    assert (fit.peak - 0.8).abs().max() < 1e-3 and (fit.hit_rate == 1).all()
    assert (bq[:, 2 * pairs :] == 0).all() and (bk[:, 2 * pairs :] == 0).all()
    torch.testing.assert_close(fit.weight_norm.float(), (bq.norm(dim=1) * bk.norm(dim=1)).sqrt())
    assert "(-3,+4)" in fit.table() and "RotaryFit(6 heads, N=126, r=64" in repr(fit)


def test_better_than_equal_amplitudes_at_their_norm():
    offsets = torch.tensor([[0, 1]])
    equal = torch.full((1, 64), 5 / math.sqrt(2))
    c, s = axial()[1].cos(), axial()[1].sin()  # of one column to the right
    back = (torch.stack([c + s, c - s], dim=1) * equal[0, 0]).view(1, 64)
    attention = attention_by_matrices(equal, back.flatten(1), axial(), 0.125, "interleaved")
    fit = init.rotary_impulse_qk_(*biases(1), axial(), offsets, GRID, scale=0.125, weight_norm=math.sqrt(800))
    _, peak, _ = map_metrics(attention, fit.targets)
    assert 0.87 < peak < 0.9
    assert fit.peak > 0.9999
    assert fit.weight_norm.item() == pytest.approx(math.sqrt(800))
    half = init.rotary_impulse_qk_(*biases(1), axial(), offsets, GRID, scale=0.125, peak=peak.item())
    assert half.weight_norm < math.sqrt(800) / 2


def test_weights_are_the_optimum():
    """No exchange between two pairs at the same norm raises the mean log attention, by brute force."""
    steps = torch.rand(2, 6, generator=torch.Generator().manual_seed(0)).double()
    problem = RotaryImpulse(steps, (1, -2), (5, 6))
    w = best_for_total(problem, 8.0)
    displacement = torch.cartesian_prod(torch.arange(5), torch.arange(6))

    def mean_log_attention(w):
        between = displacement - displacement[:, None] - torch.tensor([1, -2])
        logits = torch.cos(between.double() @ steps) @ w
        target = displacement + torch.tensor([1, -2])
        inside = ((target >= 0) & (target < torch.tensor([5, 6]))).all(dim=1)
        column = (target[:, 0] * 6 + target[:, 1])[inside]
        return logits.log_softmax(dim=1)[inside].gather(1, column[:, None]).mean()

    best = mean_log_attention(w)
    assert w.sum().item() == pytest.approx(8) and (w > 0).all()
    for give in range(6):
        for take in range(6):
            moved = w.clone()
            amount = min(0.05, w[give].item())
            moved[give] -= amount
            moved[take] += amount
            assert mean_log_attention(moved) <= best + 1e-4
    gradient = problem.derivatives(w)[0]
    numeric = torch.autograd.functional.jacobian(mean_log_attention, w)
    torch.testing.assert_close(gradient, numeric, rtol=1e-8, atol=1e-10)


def test_heads_may_differ_in_angles_norm_and_phase(generator):
    angles = torch.stack([axial(), axial(theta=1000.0), axial()])
    offsets = torch.tensor([[1, 0], [1, 0], [-1, 0]])
    bq, bk = biases(3)
    fit = init.rotary_impulse_qk_(
        bq,
        bk,
        angles,
        offsets,
        GRID,
        scale=0.125,
        weight_norm=torch.tensor([9.0, 9.0, 11.0]),
        generator=generator,
    )
    torch.testing.assert_close(fit.weight_norm, torch.tensor([9.0, 9.0, 11.0]).double())
    assert fit.peak[0] != fit.peak[1] and fit.peak[2] > fit.peak[0]
    one, two = (
        init.rotary_impulse_qk_(
            *biases(1), axial(), offsets[:1], GRID, scale=0.125, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (1, 2)
    )
    assert not torch.allclose(one.bq, two.bq) and torch.allclose(
        one.attention_map(), two.attention_map(), atol=1e-6
    )


def test_wrapped_angles_and_low_precision_are_understood(generator):
    fits = []
    for angles, dtype in (
        (axial(), torch.float32),
        (torch.atan2(axial().sin(), axial().cos()), torch.float64),
        (axial(), torch.bfloat16),
    ):
        bq, bk = (b.to(dtype) for b in biases(2))
        fits.append(
            init.rotary_impulse_qk_(
                bq,
                bk,
                angles,
                torch.tensor([[2, -1], [0, 0]]),
                GRID,
                scale=0.125,
                generator=torch.Generator().manual_seed(0),
            )
        )
    for fit in fits[1:]:
        torch.testing.assert_close(fit.bq.float(), fits[0].bq, rtol=1e-2, atol=1e-4)
        assert (map_metrics(fit.attention_map(), fit.targets)[1] - 0.7).abs().max() < 0.01


@pytest.mark.parametrize("goal", [{}, {"weight_norm": 5.0}])
def test_no_heads_and_another_default_device(goal):
    angles, offsets, some, none = axial(), torch.tensor([[0, 1]]), biases(1), biases(0)
    with torch.device("meta"):
        fit = init.rotary_impulse_qk_(*some, angles, offsets, GRID, scale=0.125, **goal)
        empty = init.rotary_impulse_qk_(*none, angles, offsets[:0], GRID, scale=0.125, **goal)
    assert fit.hit_rate == 1 and some[0].isfinite().all()
    assert len(empty.peak) == 0 and "0 heads" in repr(empty)


def test_out_of_reach_warns():
    columns_alone = axial()
    columns_alone[:, :16] = 0
    with pytest.warns(
        UserWarning, match=r"peak=0\.7 was not reached by 1 of 1 heads.*ask for less"
    ) as record:
        fit = init.rotary_impulse_qk_(*biases(1), columns_alone, torch.tensor([[0, 1]]), GRID, scale=0.125)
    assert record[0].filename == __file__
    assert fit.peak.item() == pytest.approx(1 / 14, rel=1e-3)
    with pytest.warns(UserWarning, match="uniform map"):
        fit = init.rotary_impulse_qk_(
            *biases(1), axial((2, 2)), torch.tensor([[0, 1]]), (2, 2), scale=1.0, peak=0.1
        )
    assert (fit.bq == 0).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"angles": axial().square()}, ValueError, "angles must be linear in the row"),
        ({"angles": torch.cat([torch.zeros(1, 32), axial()])}, ValueError, r"angles must be \[196, m\]"),
        ({"angles": axial(pairs=34)}, ValueError, "m <= r/2 = 32"),
        ({"angles": torch.ones(196, 32)}, ValueError, "angles must differ between tokens"),
        ({"angles": axial() * torch.nan}, ValueError, "angles must be finite"),
        ({"angles": axial().long()}, TypeError, "angles must be a floating"),
        ({"bk": torch.empty(3, 64)}, ValueError, "bq and bk must both"),
        ({"offsets": torch.zeros(3, 2).long()}, ValueError, r"offsets must be \[2, 2\]"),
        ({"offsets": torch.tensor([[0, 0], [14, 0]])}, ValueError, "leave some target"),
        ({"grid_size": (7, 28)}, ValueError, "angles must be linear"),
        ({"pairs": "quarter"}, ValueError, "pairs must be one of interleaved, half"),
        ({"peak": 0.5, "weight_norm": 1.0}, ValueError, "not both"),
        ({"scale": -1.0}, ValueError, "scale must be positive"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    bq, bk = biases(2)
    arguments = {
        "bq": bq,
        "bk": bk,
        "angles": axial(),
        "offsets": torch.zeros(2, 2).long(),
        "grid_size": GRID,
        "scale": 1.0,
    }
    with pytest.raises(error, match=message):
        init.rotary_impulse_qk_(**{**arguments, **change})


def test_angles_of_a_table():
    angles = torch.atan2(axial().sin(), axial().cos())
    interleaved = angles.repeat_interleave(2, dim=-1)
    halves = torch.cat([angles, angles], dim=-1)
    for table, layout in ((interleaved, "interleaved"), (halves, "half")):
        found = init.rotary_angles(table.sin(), table.cos(), pairs=layout)
        torch.testing.assert_close(found.float(), angles)
    with pytest.raises(ValueError, match="try 'half'"):
        init.rotary_angles(halves.sin(), halves.cos())


# --- the models' own rotation -------------------------------------------------------------------------------


def timm_tables():
    layers = pytest.importorskip("timm.layers", exc_type=ImportError)
    torch.manual_seed(0)
    index = {"in_pixels": False, "feat_shape": [14, 10]}
    return {
        "EVA-02": layers.RotaryEmbeddingCat(64, ref_feat_shape=[16, 16], **index).get_embed(),
        "Perception Encoder": layers.RotaryEmbeddingCat(
            64, grid_offset=1.0, grid_indexing="xy", **index
        ).get_embed(),
        "pixels": layers.RotaryEmbeddingCat(64, in_pixels=True, feat_shape=[14, 10]).get_embed(),
        "DINOv3": layers.RotaryEmbeddingDinoV3(64, feat_shape=[14, 10]).get_embed(),
        "mixed": layers.RotaryEmbeddingMixed(256, 2, 4, feat_shape=[14, 10]).get_embed()[1].detach(),
    } | (
        {"multimodal": layers.RotaryEmbeddingMRope(64).get_embed([14, 10])}
        if hasattr(layers, "RotaryEmbeddingMRope")  # timm 1.0.28
        else {}
    )


@pytest.mark.parametrize("name", ["EVA-02", "Perception Encoder", "pixels", "DINOv3", "mixed", "multimodal"])
def test_timms_rotation_of_the_biases_gives_the_reported_map(name, generator):
    table = timm_tables().get(name)
    if table is None:
        pytest.skip(f"this timm has no {name} embedding")
    half = name in ("DINOv3", "multimodal")
    layout = "half" if half else "interleaved"
    angles = init.rotary_angles(*table.chunk(2, dim=-1), pairs=layout)
    bq, bk = biases(4)
    offsets = torch.tensor([[0, 1], [-2, 1], [1, 0], [0, 0]])
    fit = init.rotary_impulse_qk_(
        bq, bk, angles, offsets, (14, 10), scale=0.125, pairs=layout, generator=generator
    )

    from timm.layers import apply_rot_embed_cat

    q, k = (
        apply_rot_embed_cat(b[None, :, None].expand(1, 4, 140, 64), table, half=half)[0] for b in (bq, bk)
    )
    attention = torch.softmax(0.125 * q @ k.mT, dim=-1).double()
    torch.testing.assert_close(attention, fit.attention_map(), rtol=1e-3, atol=1e-5)
    _, peak, hit_rate = map_metrics(attention, fit.targets)
    assert (peak - 0.7).abs().max() < 2e-3 and (hit_rate == 1).all()


def test_transformers_dinov3_rotation_gives_the_reported_map(generator):
    dinov3 = pytest.importorskip("transformers.models.dinov3_vit.modeling_dinov3_vit", exc_type=ImportError)
    config = dinov3.DINOv3ViTConfig(hidden_size=256, num_attention_heads=4, patch_size=16, image_size=224)
    cos, sin = dinov3.DINOv3ViTRopePositionEmbedding(config).eval()(torch.zeros(1, 3, 14 * 16, 10 * 16))
    angles = init.rotary_angles(sin, cos, pairs="half")
    bq, bk = biases(4)
    offsets = torch.tensor([[0, 1], [-2, 1], [1, 0], [0, 0]])
    fit = init.rotary_impulse_qk_(
        bq, bk, angles, offsets, (14, 10), scale=0.125, pairs="half", generator=generator
    )
    with_prefix = [b[None, :, None].expand(1, 4, 145, 64) for b in (bq, bk)]  # class token and four registers
    q, k = dinov3.apply_rotary_pos_emb(*with_prefix, cos, sin)
    attention = torch.softmax(0.125 * q[0, :, 5:] @ k[0, :, 5:].mT, dim=-1).double()
    torch.testing.assert_close(attention, fit.attention_map(), rtol=1e-3, atol=1e-5)
