"""`DriftCallback` in the Trainers of transformers and Lightning: it records what a `DriftMonitor` would."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convinit

IMAGES = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(32) % 3
DRIFT = ["drift/distance", "drift/hit_rate", "drift/peak"]


def vit(seed: int = 0):
    model = convinit.models.SimpleViT(
        16, 4, 3, dim=32, depth=2, num_heads=2, head_dim=16, mlp_dim=32, variant="vanilla",
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    return model, convinit.init_vit_(model, generator=torch.Generator().manual_seed(seed))


# ---- transformers


class ForImages(nn.Module):
    """A model as Trainer wants it: named inputs, and the loss first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values, labels):
        logits = self.model(pixel_values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def hf_trainer(folder, *, steps: int, every: int = 2, **args):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from convinit.callbacks.transformers import DriftCallback

    model, report = vit()
    data = [{"pixel_values": image, "labels": label} for image, label in zip(IMAGES, LABELS, strict=True)]
    options = {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 4, "use_cpu": True,
        "learning_rate": 1e-2, "logging_steps": 2, "save_steps": 4, "report_to": "none", "seed": 0,
        "disable_tqdm": True, "save_total_limit": None,
    }  # fmt: skip
    trainer = transformers.Trainer(
        ForImages(model), transformers.TrainingArguments(**options | args), train_dataset=data
    )
    callback = DriftCallback(trainer, report, every=every)
    trainer.add_callback(callback)
    return trainer, callback


def logged(trainer) -> dict[int, dict[str, float]]:
    return {each["step"]: each for each in trainer.state.log_history if "drift/peak" in each}


def test_transformers(tmp_path, caplog):
    trainer, callback = hf_trainer(tmp_path, steps=5)
    with caplog.at_level(logging.INFO, "convinit.callbacks"):
        trainer.train()
    history = callback.monitor.history
    assert history.steps.tolist() == [0, 1, 2, 4, 5]
    assert history.distance[0].abs().max() == 0 and history.distance[-1].min() > 0
    found = logged(trainer)
    assert list(found) == [0, 1, 2, 4, 5] and sorted(k for k in found[0] if "/" in k) == DRIFT
    for record, step in enumerate(found):
        assert found[step]["drift/peak"] == pytest.approx(history.peak[record].mean().item())
    # The loss of the same steps is logged as without the callback.
    losses = [each["step"] for each in trainer.state.log_history if "loss" in each]
    assert losses == [2, 4]
    report = json.loads((tmp_path / "init_report.json").read_text())
    assert len(report["heads"]) == 4 and "2 layers, 4 heads by 'impulse'" in caplog.text


def test_transformers_counts_optimizer_steps(tmp_path):
    trainer, callback = hf_trainer(tmp_path, steps=3, every=1, gradient_accumulation_steps=2)
    trainer.train()
    assert callback.monitor.history.steps.tolist() == [0, 1, 2, 3]


def test_transformers_goes_on_from_a_checkpoint(tmp_path):
    whole, watched = hf_trainer(tmp_path / "whole", steps=8, save_steps=100)
    whole.train()
    first, _ = hf_trainer(tmp_path / "parts", steps=8, save_steps=4)
    first.train()
    again, callback = hf_trainer(tmp_path / "parts", steps=8)
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    history, expected = callback.monitor.history, watched.monitor.history
    assert history.steps.tolist() == expected.steps.tolist() == [0, 1, 2, 4, 6, 8]
    torch.testing.assert_close(history.peak[:3], expected.peak[:3])
    assert list(logged(again)) == [0, 1, 2, 4, 6, 8]

    (tmp_path / "parts" / "checkpoint-4" / "drift.pt").unlink()  # as of a run without the callback
    late, callback = hf_trainer(tmp_path / "parts", steps=8)
    late.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    assert callback.monitor.history.steps.tolist() == [0, 6, 8]


# ---- Lightning


def lightning_parts(folder, *, steps: int, every: int = 2, save: int | None = None, **options):
    L = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.loggers import CSVLogger

    from convinit.callbacks.lightning import DriftCallback

    class Classifier(L.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch, batch_idx):
            images, labels = batch
            return F.cross_entropy(self.model(images), labels)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

    model, report = vit()
    callback = DriftCallback(report, every=every)
    kept = L.callbacks.ModelCheckpoint(folder, every_n_train_steps=save, save_top_k=-1, filename="{step}")
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, callbacks=[callback, *([kept] if save else [])],
        logger=CSVLogger(folder, flush_logs_every_n_steps=1), enable_checkpointing=save is not None,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1, **options,
    )  # fmt: skip
    data = torch.utils.data.TensorDataset(IMAGES, LABELS)
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    return trainer, Classifier(model), loader, callback


def csv_rows(trainer) -> dict[int, dict[str, str]]:
    import csv
    from pathlib import Path

    with (Path(trainer.log_dir) / "metrics.csv").open() as file:
        return {int(row["step"]): row for row in csv.DictReader(file) if row.get("drift/peak")}


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers and the like
def test_lightning(tmp_path):
    from pathlib import Path

    trainer, module, loader, callback = lightning_parts(tmp_path, steps=5)
    trainer.fit(module, loader)
    history = callback.monitor.history
    assert history.steps.tolist() == [0, 1, 2, 4, 5]
    assert history.distance[0].abs().max() == 0 and history.distance[-1].min() > 0
    rows = csv_rows(trainer)
    assert list(rows) == [0, 1, 2, 4, 5] and sorted(k for k in rows[0] if "/" in k) == DRIFT
    for record, step in enumerate(rows):
        assert float(rows[step]["drift/peak"]) == pytest.approx(history.peak[record].mean().item())
    report = json.loads((Path(trainer.log_dir) / "init_report.json").read_text())
    assert len(report["heads"]) == 4


@pytest.mark.filterwarnings("ignore")
def test_lightning_counts_optimizer_steps(tmp_path):
    trainer, module, loader, callback = lightning_parts(tmp_path, steps=3, every=1, accumulate_grad_batches=2)
    trainer.fit(module, loader)
    assert callback.monitor.history.steps.tolist() == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore")
def test_lightning_goes_on_from_a_checkpoint(tmp_path):
    trainer, module, loader, watched = lightning_parts(tmp_path / "whole", steps=7, save=3)
    trainer.fit(module, loader)
    trainer, module, loader, callback = lightning_parts(tmp_path / "again", steps=7)
    trainer.fit(module, loader, ckpt_path=tmp_path / "whole" / "step=3.ckpt")
    assert callback.monitor.history.steps.tolist() == [0, 1, 2, 4, 6, 7]
    # Lightning begins the epoch anew, so the later records are of other images.
    torch.testing.assert_close(callback.monitor.history.peak[:2], watched.monitor.history.peak[:2])

    trainer, module, loader, callback = lightning_parts(tmp_path / "late", steps=7)
    content = torch.load(tmp_path / "whole" / "step=3.ckpt", weights_only=False)
    content["callbacks"] = {}  # as of a run without the callback
    torch.save(content, tmp_path / "plain.ckpt")
    trainer.fit(module, loader, ckpt_path=tmp_path / "plain.ckpt")
    assert callback.monitor.history.steps.tolist() == [0, 4, 6, 7]
