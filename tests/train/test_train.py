from __future__ import annotations

import pytest
import torch

from convinit.train import batches, load_digits_split, shift_images
from convinit.train.accelerator import plain_accelerator
from convinit.train.config import RecipeConfig
from convinit.train.optim import make_schedule


def test_digits_are_split_without_overlap_and_the_same_every_time():
    data, again = load_digits_split(), load_digits_split()
    assert data.train_images.shape == (1000, 1, 8, 8) and data.test_images.shape == (797, 1, 8, 8)
    assert torch.equal(data.train_images, again.train_images) and torch.equal(
        data.test_labels, again.test_labels
    )
    assert data.train_images.min() == 0 and data.train_images.max() == 1

    from sklearn.datasets import load_digits

    whole = load_digits()
    rows = torch.cat([data.train_images, data.test_images]).flatten(1).mul(16).to(torch.int64)
    labels = torch.cat([data.train_labels, data.test_labels])
    got = sorted([*row, label] for row, label in zip(rows.tolist(), labels.tolist(), strict=True))
    expected = zip(whole.data.astype(int).tolist(), whole.target.tolist(), strict=True)
    assert got == sorted([*row, label] for row, label in expected)
    assert not torch.equal(load_digits_split(seed=1).train_labels, data.train_labels)


def test_digits_split_sizes():
    data = load_digits_split(100)
    assert len(data.train_labels) == 100 and len(data.test_labels) == 1697
    with pytest.raises(ValueError, match="num_train must be below 1797"):
        load_digits_split(1797)


@pytest.mark.parametrize("dy, dx", [(1, 0), (-1, 0), (0, 1), (0, -1), (2, -3), (0, 0), (-9, 1), (3, 4)])
def test_shift_fills_with_zeros(dy, dx):
    images = torch.rand(2, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros_like(images)
    for i in range(3):
        for j in range(4):
            if 0 <= i - dy < 3 and 0 <= j - dx < 4:
                expected[..., i, j] = images[..., i - dy, j - dx]
    assert torch.equal(shift_images(images, dy, dx), expected)


def test_batches_hold_every_image_once_in_a_new_order_each_epoch():
    images, labels = torch.arange(10.0).view(10, 1), torch.arange(10)
    loader = batches(images, labels, 4, shuffle=True, generator=torch.Generator().manual_seed(0))
    epochs = [torch.cat([batch for _, batch in loader]) for _ in range(2)]
    assert [len(batch) for _, batch in loader] == [4, 4, 2]
    assert all(torch.equal(epoch.sort().values, labels) for epoch in epochs)
    assert not torch.equal(*epochs)
    assert all(torch.equal(x[:, 0], y.float()) for x, y in loader)
    assert torch.equal(torch.cat([y for _, y in batches(images, labels, 4)]), labels)
    with pytest.raises(ValueError, match="equally many, got 10 and 9"):
        batches(images, labels[:9], 4)


def test_the_environment_does_not_change_gradients(monkeypatch):
    """Accelerate would divide each gradient by the steps of an accumulation that nobody does."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    accelerator = plain_accelerator(cpu=True)
    gradient = torch.ones((), requires_grad=True)
    accelerator.backward(gradient * 3)
    assert gradient.grad == 3 and accelerator.mixed_precision == "no"
    assert accelerator.state.dynamo_plugin.backend.value == "NO"


@pytest.mark.parametrize("name", ["USE_FSDP", "USE_DEEPSPEED", "USE_MEGATRON_LM", "USE_PARALLELISM_CONFIG"])
def test_other_engines_are_refused(name, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_{name}", "true")
    with pytest.raises(ValueError, match=f"ACCELERATE_{name} must not be set"):
        plain_accelerator()


def test_a_cooldown_leaves_a_step():
    recipe = RecipeConfig(lr=1e-3, epochs=2, cooldown_epochs=1.9, min_lr=1e-5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=recipe.lr)
    schedule = make_schedule(optimizer, recipe, steps_per_epoch=1)
    assert optimizer.param_groups[0]["lr"] == recipe.lr
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(recipe.min_lr)


def test_the_schedule_is_timms():
    """Warm-up in the place of the cosine's first epochs, as timm's scheduler at each step."""
    scheduler = pytest.importorskip("timm.scheduler")
    recipe = RecipeConfig(lr=2e-3, epochs=32, warmup_epochs=5, cooldown_epochs=2, warmup_lr=1e-6, min_lr=1e-5)
    weight = torch.nn.Parameter(torch.zeros(2))
    ours, theirs = (torch.optim.SGD([weight], lr=recipe.lr) for _ in range(2))
    schedule = make_schedule(ours, recipe, steps_per_epoch=4)
    expected, epochs = scheduler.create_scheduler_v2(
        theirs, sched="cosine", num_epochs=30, warmup_epochs=5, cooldown_epochs=2, warmup_lr=1e-6,
        min_lr=1e-5, step_on_epochs=False, updates_per_epoch=4,
    )  # fmt: skip
    assert epochs == recipe.epochs
    for step in range(4 * epochs):
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9), step
        ours.step()
        schedule.step()
        expected.step_update(step + 1)
