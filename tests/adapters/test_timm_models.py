"""`convinit.adapters.timm`: timm's create_model, its registry and an unmodified training script."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import convinit
import convinit.adapters.timm as ways

timm = pytest.importorskip("timm", exc_type=ImportError)

NAME = "vit_tiny_patch16_224"
SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
INIT = {"kernel_size": 3, "pos_embed_gain": 60}

# What timm's train.py does with the model it is asked for, in its order.
TRAIN = """
import argparse
import torch, timm
from timm.data import resolve_data_config
from timm.optim import create_optimizer_v2
from timm.utils import random_seed, setup_default_logging

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="resnet50")
parser.add_argument("--pretrained", action="store_true")
parser.add_argument("--num-classes", type=int, default=None)
parser.add_argument("--img-size", type=int, default=None)
parser.add_argument("--seed", type=int, default=42)
parser.add_argument("--opt", default="adamw")
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--model-kwargs", nargs="*", default={}, action=timm.utils.ParseKwargs)

def main():
    setup_default_logging()
    args = parser.parse_args()
    random_seed(args.seed, 0)
    model = timm.create_model(
        args.model, pretrained=args.pretrained, num_classes=args.num_classes, img_size=args.img_size,
        scriptable=False, checkpoint_path="", **args.model_kwargs,
    )
    mean = resolve_data_config(vars(args), model=model)["mean"]
    torch.save(model.state_dict(), "initial.pt")
    optimizer = create_optimizer_v2(model, opt=args.opt, lr=args.lr)
    loss = torch.nn.functional.cross_entropy(model(torch.randn(2, 3, 16, 16)), torch.tensor([0, 1]))
    loss.backward()
    optimizer.step()
    print("mean", mean, "loss", loss.item())

if __name__ == "__main__":
    main()
"""


def states_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def registered():
    """The small ViT's impulse variant; its name is taken out of timm's registry afterwards."""
    name = ways.register(NAME, **INIT)
    yield name
    from timm.models import _registry

    _registry._model_entrypoints.pop(name)


def test_create_model_is_timms_and_then_init_vit(caplog):
    with caplog.at_level(logging.INFO):
        torch.manual_seed(1)
        ours = ways.create_model(NAME, init=INIT, generator=torch.Generator().manual_seed(2), **SMALL)
    torch.manual_seed(1)
    theirs = timm.create_model(NAME, **SMALL)
    report = convinit.init_vit_(theirs, **INIT, generator=torch.Generator().manual_seed(2))
    assert states_equal(ours.state_dict(), theirs.state_dict())
    assert ours.init_report.to_pandas().drop(columns="name").equals(report.to_pandas().drop(columns="name"))
    assert ours.init_report.summary() in caplog.text


def test_a_registered_name_is_create_model_with_torchs_own_generator(registered):
    assert registered == f"{NAME}_impulse" and registered in timm.list_models("vit_tiny*")
    torch.manual_seed(3)
    ours = timm.create_model(registered, **SMALL)
    torch.manual_seed(3)
    assert states_equal(ours.state_dict(), ways.create_model(NAME, init=INIT, **SMALL).state_dict())
    assert min(record.peak.min() for record in ours.init_report.records) > 0.6
    # the data settings of the model that it stands for, and none of its weights
    assert timm.get_pretrained_cfg(registered).mean == timm.get_pretrained_cfg(NAME).mean
    assert registered not in timm.list_models(pretrained=True)


def test_a_checkpoint_replaces_the_initial_weights(registered, tmp_path):
    saved = timm.create_model(NAME, **SMALL)
    torch.save(saved.state_dict(), tmp_path / "saved.pt")
    model = timm.create_model(registered, **SMALL, checkpoint_path=str(tmp_path / "saved.pt"))
    assert states_equal(model.state_dict(), saved.state_dict())


def test_a_training_script_that_nobody_changed(tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    two_lines = (
        f"import convinit.adapters.timm, runpy; convinit.adapters.timm.register({NAME!r}, **{INIT!r})\n"
        "runpy.run_path('train.py', run_name='__main__')"
    )
    sizes = [f"{name}={SMALL[name]}" for name in ("patch_size", "embed_dim", "depth", "num_heads")]
    done = subprocess.run(
        [sys.executable, "-c", two_lines, "--model", f"{NAME}_impulse", "--seed", "7", "--num-classes", "5",
         "--img-size", "16", "--model-kwargs", *sizes],
        cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(convinit.__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "mean (0.5, 0.5, 0.5) loss" in done.stdout
    assert "2 layers, 8 heads by 'impulse'" in done.stdout + done.stderr  # in the script's log
    timm.utils.random_seed(7, 0)
    expected = ways.create_model(NAME, init=INIT, **SMALL).state_dict()
    assert states_equal(torch.load(tmp_path / "initial.pt"), expected)


def test_what_cannot_be_meant_is_refused(registered):
    for make in (
        lambda: timm.create_model(registered, pretrained=True, **SMALL),
        lambda: ways.create_model(NAME, pretrained=True, **SMALL),
        lambda: ways.create_model(NAME, checkpoint_path="weights.pt", **SMALL),
    ):
        with pytest.raises(ValueError, match="would overwrite trained queries and keys"):
            make()
    with pytest.raises(TypeError, match="init must have arguments of convinit.init_vit_.*'kernelsize'"):
        ways.create_model(NAME, init={"kernelsize": 3}, **SMALL)
    with pytest.raises(TypeError, match="init must have arguments of convinit.init_vit_.*'kernelsize'"):
        ways.register(NAME, kernelsize=3)
    with pytest.raises(ValueError, match="model_name must be a model that this timm .* knows"):
        ways.register("vit_teeny")
    with pytest.raises(ValueError, match="registered_name must be new, but timm has a model 'resnet50'"):
        ways.register(NAME, registered_name="resnet50")
    with pytest.raises(ValueError, match="registered_name must be letters, digits"):
        ways.register(NAME, registered_name="vit.impulse")
