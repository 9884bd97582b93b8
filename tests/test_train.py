from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from convinit.train import accuracy, batches, load_digits_split, shift_images, train
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
    data = load_digits_split(100, num_test=20)
    assert len(data.train_labels) == 100 and len(data.test_labels) == 20
    with pytest.raises(ValueError, match="num_train must be below 1797"):
        load_digits_split(1797)
    with pytest.raises(ValueError, match="num_test must be at most 797"):
        load_digits_split(1000, num_test=798)


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


def linear_problem(n: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(n, 6, generator=torch.Generator().manual_seed(0))
    return images, images[:, :3].argmax(dim=1)


def run(epochs: int = 4, lr: float = 0.05, weight_decay: float = 0.01):
    images, labels = linear_problem()
    model = nn.Linear(6, 3)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    order = torch.Generator().manual_seed(1)
    loader = batches(images, labels, 32, shuffle=True, generator=order)
    test = batches(images, labels, 50)
    return model, list(train(model, loader, test, epochs=epochs, lr=lr, weight_decay=weight_decay))


def test_train_is_adamw_under_a_one_cycle_schedule():
    """Against the loop written out."""
    model, records = run()
    images, labels = linear_problem()
    weight = torch.zeros(3, 6, requires_grad=True)
    bias = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=0.05, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=12)
    loader = batches(images, labels, 32, shuffle=True, generator=torch.Generator().manual_seed(1))
    for record in records:
        losses = []
        for x, y in loader:
            loss = nn.functional.cross_entropy(x @ weight.T + bias, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            last_lr = schedule.get_last_lr()[0]
            schedule.step()
            losses.append(loss.item())
        correct = (images @ weight.T + bias).argmax(dim=1) == labels
        assert record.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert record.accuracy == pytest.approx(correct.double().mean().item(), abs=1e-9)
        assert record.lr == pytest.approx(last_lr)
    torch.testing.assert_close(model.weight, weight.detach())
    assert [record.epoch for record in records] == [1, 2, 3, 4]
    assert records[-1].loss < records[0].loss


def test_train_repeats_itself():
    first, second = run(), run()
    assert torch.equal(first[0].weight, second[0].weight)
    assert [r.loss for r in first[1]] == [r.loss for r in second[1]]


def test_train_refuses():
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        run(epochs=0)
    with pytest.raises(ValueError, match="lr must be above 0, got -1"):
        run(lr=-1)
    images, labels = linear_problem()
    with pytest.raises(FloatingPointError, match="loss became nan in epoch 1; lower lr"):
        loader = batches(images * float("nan"), labels, 32)
        list(train(nn.Linear(6, 3), loader, loader, epochs=1))
    with pytest.raises(ValueError, match="at least one batch"):
        empty = batches(images[:0], labels[:0], 4)
        train(nn.Linear(6, 3), empty, empty, epochs=1)


def test_accuracy_is_measured_in_evaluation_mode():
    images, labels = linear_problem(10)
    model = nn.Sequential(nn.Dropout(1.0), nn.Linear(6, 3))
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(3, 6))
        model[1].bias.zero_()
    assert accuracy(model, batches(images, labels, 3)) == 1.0
    with pytest.raises(ValueError, match="at least one image"):
        accuracy(model, batches(images[:0], labels[:0], 3))


def losses(count: int = 1, **options) -> list[float]:
    data = load_digits_split(64, num_test=10)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    loader = batches(data.train_images, data.train_labels, 16)
    tests = batches(data.test_images, data.test_labels, 10)
    return [each.loss for each in train(model, loader, tests, epochs=2, lr=1.0, weight_decay=0.0, **options)]


def test_the_environment_does_not_change_gradients(monkeypatch):
    """Accelerate would divide each gradient by the steps of an accumulation that nobody does."""
    expected = losses()
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    assert losses() == expected
    accelerator = plain_accelerator(cpu=True)
    gradient = torch.ones((), requires_grad=True)
    accelerator.backward(gradient * 3)
    assert gradient.grad == 3 and accelerator.mixed_precision == "no"
    assert accelerator.state.dynamo_plugin.backend.value == "NO"
    with pytest.raises(ValueError, match="gradient_accumulation_steps = 1, .* got 4 .*ACCUMULATION_STEPS"):
        losses(accelerator=Accelerator(cpu=True))


@pytest.mark.parametrize("name", ["USE_FSDP", "USE_DEEPSPEED", "USE_MEGATRON_LM", "USE_PARALLELISM_CONFIG"])
def test_other_engines_are_refused(name, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_{name}", "true")
    with pytest.raises(ValueError, match=f"ACCELERATE_{name} must not be set"):
        plain_accelerator()


def test_the_schedule_is_timms():
    """Warm-up in the place of the cosine's first epochs, as timm's scheduler at each step."""
    scheduler = pytest.importorskip("timm.scheduler")
    recipe = RecipeConfig(lr=2e-3, epochs=30, warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5)
    weight = torch.nn.Parameter(torch.zeros(2))
    ours, theirs = (torch.optim.SGD([weight], lr=recipe.lr) for _ in range(2))
    schedule = make_schedule(ours, recipe, steps_per_epoch=4)
    expected, _ = scheduler.create_scheduler_v2(
        theirs, sched="cosine", num_epochs=30, warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5,
        step_on_epochs=False, updates_per_epoch=4,
    )  # fmt: skip
    for step in range(120):
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9), step
        ours.step()
        schedule.step()
        expected.step_update(step + 1)
