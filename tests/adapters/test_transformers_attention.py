"""`register_attention`: convinit's attention inside Hugging Face's models."""

from __future__ import annotations

import pytest
import torch

from convinit.adapters import transformers as entry
from convinit.adapters.transformers import register_attention

transformers = pytest.importorskip("transformers", minversion="5", exc_type=ImportError)

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "image_size": 16, "patch_size": 4, "qkv_bias": True,
}  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of every call of our op that a model makes."""
    made = []

    def watched(*args, **kwargs):
        made.append(kwargs)
        return original(*args, **kwargs)

    original = entry.positional_attention
    monkeypatch.setattr(entry, "positional_attention", watched)
    return made


def make(family: str, **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **options)
    model = getattr(transformers, f"{family}Model")(config).eval()
    for parameter in model.parameters():  # some begin as zeros, which a LayerNorm cannot differentiate well
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("family", ["ViT", "DeiT", "ViTMAE"])
def test_outputs_and_gradients_are_those_of_eager(family, backend, calls):
    model = make(family)
    images, weights = torch.randn(2, 3, 16, 16), None
    noise = {"noise": torch.rand(2, 16)} if family == "ViTMAE" else {}  # which patches it hides

    def run(implementation, dtype):
        nonlocal weights
        model.set_attn_implementation(implementation)
        model.to(dtype).zero_grad()
        pixels = images.to(dtype, copy=True).requires_grad_()
        out = model(pixels, **noise).last_hidden_state
        weights = torch.randn_like(out) if weights is None else weights
        (out * weights).sum().backward()
        return [out.detach(), pixels.grad] + [p.grad for p in model.parameters() if p.grad is not None]

    exact, eager = run("eager", torch.float64), run("eager", torch.float32)
    ours = run(register_attention(backend=backend), torch.float32)
    assert len(calls) == 2 and all(call["backend"] == backend for call in calls)  # one for each layer
    for mine, theirs, true in zip(ours, eager, exact, strict=True):
        error = (mine - true).abs().max()
        assert error <= 4 * (theirs - true).abs().max() + 1e-6 * true.abs().max()


def test_dropout_and_scale_reach_the_op(calls):
    model = make("ViT", attention_probs_dropout_prob=0.25)
    model.set_attn_implementation(register_attention())
    model(torch.randn(1, 3, 16, 16))
    model.train()(torch.randn(1, 3, 16, 16))
    assert [call["dropout_p"] for call in calls] == [0.0, 0.0, 0.25, 0.25]
    assert {call["scale"] for call in calls} == {8**-0.5}


def test_an_explicit_backend_never_falls_back():
    model = make("ViT")
    model.set_attn_implementation(register_attention("convinit_triton", backend="triton"))
    with pytest.raises((ValueError, RuntimeError), match='backend="triton" needs'):
        model(torch.randn(1, 3, 16, 16))


@pytest.mark.gpu
def test_the_fused_kernels_run_in_a_model_on_a_gpu():
    model, images = make("ViT").cuda(), torch.randn(2, 3, 16, 16, device="cuda")
    model.set_attn_implementation("eager")
    expected = model(images).last_hidden_state
    model.set_attn_implementation(register_attention("convinit_triton", backend="triton"))
    torch.testing.assert_close(model(images).last_hidden_state, expected, rtol=2e-2, atol=2e-2)


def test_what_it_cannot_do_is_refused():
    model, images = make("ViT"), torch.randn(2, 3, 16, 16)
    model.set_attn_implementation(register_attention())
    mask = torch.ones(2, 17)
    torch.testing.assert_close(model(images, attention_mask=mask)[0], model(images)[0])  # it hides nothing
    mask[0, 3] = 0
    for hiding in (mask, torch.zeros(2, 1, 17, 17)):
        with pytest.raises(ValueError, match="attention_mask must be None or hide nothing .*'convinit'"):
            model(images, attention_mask=hiding)
    with pytest.raises(ValueError, match="output_attentions must be False"):
        model(images, output_attentions=True)
    with pytest.raises(ValueError, match="position_bias must be None"):
        model.layers[0].attention(torch.randn(1, 5, 32), position_bias=torch.zeros(1, 4, 5, 5))
    with pytest.raises(ValueError, match="is_causal must be False"):
        model.layers[0].attention(torch.randn(1, 5, 32), is_causal=True)
    for name in ("eager", "sdpa"):
        with pytest.raises(ValueError, match=f"transformers has an attention implementation '{name}'"):
            register_attention(name)
    with pytest.raises(ValueError, match="backend must be one of"):
        register_attention(backend="flash")


def test_autocast_with_rotary_embedding_that_leaves_float32():
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    options = {"num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 64, "image_size": 32}
    torch.manual_seed(0)
    model = transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(hidden_size=48, patch_size=8, **options)
    ).eval()
    images, outputs = torch.randn(1, 3, 32, 32), {}
    for name in ("sdpa", register_attention()):
        model.set_attn_implementation(name)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            outputs[name] = model(images).last_hidden_state.float()
    torch.testing.assert_close(outputs["convinit"], outputs["sdpa"], rtol=0.02, atol=0.02)
