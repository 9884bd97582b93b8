from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")

from typer.testing import CliRunner

from convinit.cli.app import app
from convinit.models import ConvMixer, SimpleViT
from convinit.ops.positional_op import fused_positional_attention
from convinit.serve import export
from convinit.serve.export import _set_backends_

slow = pytest.mark.slow
VIT = {"dim": 16, "depth": 2, "num_heads": 2, "head_dim": 8, "mlp_dim": 8, "kernel_size": 3}
MIXER = {"dim": 8, "depth": 2, "kernel_size": 3}
SHAPE = (3, 8, 8)


def vit(**options):
    return SimpleViT(8, 2, 5, generator=torch.Generator().manual_seed(0), **VIT | options)


def mixer(**options):
    model = ConvMixer(8, 2, 5, generator=torch.Generator().manual_seed(0), **MIXER | options)
    model(images(4))  # moves BatchNorm's statistics
    return model


def timm_model(name, **options):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **options)


def images(batch):
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(3))


MODELS = {
    "vanilla": lambda: vit(variant="vanilla"),
    "I": lambda: vit(),
    "I, frozen": lambda: vit(trainable_mixing=False, value=False, proj=False),
    "II": lambda: vit(variant="II"),
    "III": lambda: vit(variant="III", method="random"),
    "mixer": lambda: mixer(),
    "mixer, frozen impulses": lambda: mixer(method="impulse", trainable_mixing=False),
    "mixer, shared softmax": lambda: mixer(method="softmax", num_filters=3, share_layers=True),
    "mixer, matrices": lambda: mixer(method="permutation", matrix_form=True, num_filters=3),
    "timm's vit": lambda: timm_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, depth=1, embed_dim=16, num_heads=2
    ),
    "timm's swin": lambda: timm_model(
        "swin_tiny_patch4_window7_224",
        img_size=8,
        patch_size=1,
        window_size=4,
        depths=(2, 1),
        num_heads=(1, 2),
        embed_dim=8,
    ),  # fmt: skip
}
QUICK = {
    ("I", "onnx"),
    ("II", "torch-export"),
    ("mixer, frozen impulses", "torch-export"),
}
CASES = [
    pytest.param(name, format, marks=() if (name, format) in QUICK else slow)
    for name in MODELS
    for format in ("torch-export", "onnx")
]


def run(path, format, batch):
    if format == "torch-export":
        return torch.export.load(path).module()(batch)
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path))
    return torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])


def needs(format):
    if format == "onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name)


@pytest.mark.parametrize(("name", "format"), CASES)
def test_any_batch_gives_the_logits_of_pytorch(name, format, tmp_path):
    needs(format)
    model = MODELS[name]().train()
    path = tmp_path / "new" / ("m.onnx" if format == "onnx" else "m.pt2")
    assert export(model, path, SHAPE, format=format) < 1e-5
    assert model.training  # left as it was
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    model.eval()
    for batch in (1, 3, 8):
        expected = model(images(batch))
        assert (run(path, format, images(batch)) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("format", ["torch-export", pytest.param("onnx", marks=slow)])
def test_the_file_holds_the_metadata_and_no_paths(format, tmp_path):
    needs(format)
    path = tmp_path / "m.pt2"
    export(vit(depth=1), path, SHAPE, format=format, metadata={"class_names": ["ö", "b"]})
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path))
        text = session.get_modelmeta().custom_metadata_map["convinit"]
        assert session.get_inputs()[0].shape == ["batch", 3, 8, 8]
        assert session.get_outputs()[0].shape == ["batch", 5]
    else:
        files = {"convinit": ""}
        torch.export.load(path, extra_files=files)
        text = files["convinit"]
    text = text.decode() if isinstance(text, bytes) else text
    assert json.loads(text) == {"class_names": ["ö", "b"]}
    content = path.read_bytes()
    assert b"simple_vit.py" not in content and b"site-packages" not in content


def test_what_computes_something_else_is_not_written(tmp_path, monkeypatch):
    path = tmp_path / "m.pt2"
    path.write_bytes(b"earlier")

    def broken(model, own, shared):
        _set_backends_(model, own, shared)
        if own != "auto":
            with torch.no_grad():
                model.head.bias[1] += 1e-3

    monkeypatch.setattr(sys.modules["convinit.serve.export"], "_set_backends_", broken)
    with pytest.raises(RuntimeError, match="logits of PyTorch to 0.0001 .* got a difference of"):
        export(vit(depth=1), path, SHAPE, format="torch-export")
    assert path.read_bytes() == b"earlier" and len(list(tmp_path.iterdir())) == 1
    export(vit(depth=1), path, SHAPE, format="torch-export", tolerance=0.1)
    assert path.read_bytes() != b"earlier"


def test_nan_in_one_batch_is_a_difference(tmp_path, monkeypatch):
    found = iter([0.0, float("nan"), 0.0])
    monkeypatch.setattr(sys.modules["convinit.serve.export"], "_difference", lambda *_: next(found))
    with pytest.raises(RuntimeError, match="got a difference of nan"):
        export(vit(depth=1), tmp_path / "m.pt2", SHAPE, format="torch-export")


class OwnOp(nn.Module):
    def forward(self, images):
        q = images.flatten(2).unsqueeze(1)  # [B, 1, 3, 64]
        return fused_positional_attention(q, q, q, None, None, 0.1, 1.0).mean(1)


class DataDependent(nn.Module):
    def forward(self, images):
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (OwnOp, "PyTorch's operators alone, got convinit.positional_attention"),
        (DataDependent, "cannot be exported"),
    ],
)
def test_what_cannot_be_exported_leaves_no_file(model, match, tmp_path):
    with pytest.raises(RuntimeError, match=match):
        export(model(), tmp_path / "new" / "m.pt2", SHAPE, format="torch-export")
    assert not list(tmp_path.iterdir())


def test_wrong_arguments(tmp_path):
    model = vit(depth=0)
    with pytest.raises(ValueError, match="format must be one of torch-export, onnx, got 'tf'"):
        export(model, tmp_path / "m", SHAPE, format="tf")
    for shape in ((3, 8, 9), (1, 8, 8)):
        with pytest.raises(ValueError, match=r"images must be \[B, 3, 8, 8\]"):
            export(model, tmp_path / "m", shape, format="torch-export")
    with pytest.raises(ValueError, match="metadata must hold what JSON can"):
        export(model, tmp_path / "m", SHAPE, format="torch-export", metadata={"a": float("inf")})
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        export(model, tmp_path / "folder", SHAPE, format="torch-export")
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages_name_the_extra(missing, tmp_path, monkeypatch):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None if name == missing else sys)
    with pytest.raises(ImportError, match=rf"needs {missing}, .*pip install 'convinit\[export\]'"):
        export(vit(depth=0), tmp_path / "m.onnx", SHAPE)
    assert not list(tmp_path.iterdir())


def test_a_mistyped_ending_makes_no_folder(tmp_path):
    done = CliRunner().invoke(app, ["export", str(tmp_path), "--out", str(tmp_path / "model.onx")])
    assert done.exit_code == 2 and "did you mean .onnx?" in " ".join(done.output.split())
    assert not any(tmp_path.iterdir())
