"""The examples as people run them."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def printed(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("timm_vit.py", "timm"),
        ("torchvision_vit.py", "torchvision"),
        ("huggingface_vit.py", "transformers"),
        ("vit_pytorch_simple_vit.py", "vit_pytorch"),
    ],
)
def test_a_librarys_model_is_initialised_and_learns(name, library, capsys):
    pytest.importorskip(library, exc_type=ImportError)
    for other in ("accelerate", "sklearn"):
        pytest.importorskip(other)
    text = printed(name, capsys)
    assert float(re.search(r"peak (\d\.\d+) on your images, 0.70 was asked", text)[1]) > 0.65
    losses = [float(loss) for loss in re.findall(r"loss (\d\.\d+)", text)]
    assert len(losses) == 3 and losses[-1] < losses[0] - 0.2


def test_an_adapter_for_an_unknown_model(capsys):
    text = printed("own_adapter.py", capsys)
    assert "4 layers, 16 heads by 'impulse'" in text
    assert float(re.search(r"peak (\d\.\d+) on synthetic images .*, 0.70 was asked", text)[1]) > 0.65
