"""`DriftMonitor`: records against maps computed apart from it, and that it leaves the model alone."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F

import convinit
from convinit import viz

STEPS = 5


def build(seed: int = 0, method: str = "impulse"):
    model = convinit.models.SimpleViT(
        image_size=(8, 10), patch_size=2, num_classes=3, dim=32, depth=2, num_heads=3, head_dim=16,
        mlp_dim=32, variant="vanilla", generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    return model, convinit.init_vit_(model, method=method, generator=torch.Generator().manual_seed(seed))


def train(model, monitor, steps: int, first: int = 0) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(first, first + steps):
        images = torch.randn(4, 3, 8, 10, generator=torch.Generator().manual_seed(step))
        loss = F.cross_entropy(model(images), torch.arange(4) % 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        monitor.step()


def test_records_what_the_maps_say():
    model, report = build()
    start = torch.stack(viz.head_maps(report))
    monitor = convinit.DriftMonitor(report, every=2)
    train(model, monitor, STEPS)
    now = torch.stack(viz.head_maps(report))
    monitor.record()
    monitor.record()  # of no use twice
    history = monitor.history
    assert history.steps.tolist() == [0, 1, 2, 4, 5] and history.layers.tolist() == [0, 1]
    torch.testing.assert_close(history.peak[0], torch.stack([r.peak for r in report.records]).float())
    for layer, record in enumerate(report.records):
        for head in range(3):
            inside = record.targets[head] >= 0
            on_target = now[layer, head][inside].gather(1, record.targets[head][inside, None])
            assert history.peak[-1, layer, head].item() == pytest.approx(on_target.mean().item(), abs=1e-6)
    moved = (now - start).clamp(min=0).sum(dim=3).mean(dim=2)  # rows add up to 1: what one gains, others lose
    assert moved.max() > 0.05
    torch.testing.assert_close(history.distance[-1], moved, rtol=0, atol=1e-3)
    assert (history.distance[0] == 0).all()
    torch.testing.assert_close(torch.stack(monitor.start).float(), start, rtol=1e-3, atol=1e-4)


def test_a_short_training_has_a_curve_too():
    model, report = build()
    monitor = convinit.DriftMonitor(report)
    train(model, monitor, 20)
    assert monitor.history.steps.tolist() == [0, 1, 2, 4, 8, 16]


def test_leaves_model_and_random_numbers_alone():
    model, report = build()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    monitor = convinit.DriftMonitor(report, every=1)
    monitor.step()
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters() if p.is_floating_point())
    assert not any(values.requires_grad for values in (monitor.history.peak, monitor.history.distance))


def test_goes_on_from_a_state():
    model, report = build()
    monitor = convinit.DriftMonitor(report, every=2)
    train(model, monitor, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "drift": monitor.state_dict()}, file)
    train(model, monitor, 3, first=3)

    file.seek(0)
    state = torch.load(file, weights_only=True)
    other, other_report = build()
    other.load_state_dict(state["model"])
    resumed = convinit.DriftMonitor(other_report, every=2)
    resumed.load_state_dict(state["drift"])
    train(other, resumed, 3, first=3)
    for name in ("steps", "peak", "hit_rate", "distance"):
        assert torch.equal(getattr(resumed.history, name), getattr(monitor.history, name))

    wrong = {**state["drift"], "start": state["drift"]["start"][:1]}
    with pytest.raises(ValueError, match="of a monitor of the same model"):
        resumed.load_state_dict(wrong)


def test_refuses_a_model_whose_parameters_were_replaced():
    model, report = build()
    monitor = convinit.DriftMonitor(report, every=1)
    copies = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(copies, assign=True)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn .*has got other tensors"):
        monitor.step()


def test_heads_without_targets_have_only_a_distance():
    model, report = build(method="mimetic")
    monitor = convinit.DriftMonitor(report, every=1)
    train(model, monitor, 1)
    history = monitor.history
    assert history.peak.isnan().all() and history.hit_rate.isnan().all()
    assert history.distance[1].max() > 0.01
    with pytest.raises(ValueError, match="history has no peak"):
        viz.drift(history)


def test_to_pandas():
    pytest.importorskip("pandas")
    model, report = build()
    monitor = convinit.DriftMonitor(report, every=1)
    train(model, monitor, 1)
    frame = monitor.history.to_pandas()
    assert (
        list(frame.columns) == ["step", "layer", "head", "peak", "hit_rate", "distance"] and len(frame) == 12
    )
    row = frame[(frame.step == 1) & (frame.layer == 1) & (frame["head"] == 2)]
    assert row.distance.item() == monitor.history.distance[1, 1, 2].item()


class Recorder:
    """Keeps what TensorBoard's SummaryWriter would write."""

    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}
        self.images: list[tuple[str, int]] = []

    def add_scalar(self, tag, value, step):
        assert (tag, step) not in self.scalars
        self.scalars[tag, step] = value

    def add_image(self, tag, image, step, dataformats):
        assert dataformats == "HWC" and image.ndim == 3 and image.std() > 10
        self.images.append((tag, step))


def test_writes_means_and_images():
    model, report = build()
    writer = Recorder()
    monitor = convinit.DriftMonitor(report, every=1, writer=writer, image_every=2)
    assert not writer.scalars  # a monitor that goes on from a state has written the start before
    train(model, monitor, 3)
    assert [step for _, step in writer.images] == [0, 2]
    for name in ("peak", "hit_rate", "distance"):
        values = getattr(monitor.history, name)
        for step in range(4):
            assert writer.scalars[f"{name}/all_layers", step] == pytest.approx(values[step].mean().item())
            assert writer.scalars[f"{name}/layer_1", step] == pytest.approx(values[step, 1].mean().item())
    resumed = convinit.DriftMonitor(report, every=1, writer=Recorder())
    resumed.load_state_dict(monitor.state_dict())
    resumed.step()
    assert {step for _, step in resumed._writer.scalars} == {4}


def test_tensorboard_reads_it(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    _, report = build()
    with SummaryWriter(tmp_path) as writer:
        monitor = convinit.DriftMonitor(report, every=1, writer=writer)
        monitor.step()
    read = EventAccumulator(str(tmp_path)).Reload()
    peaks = [event.value for event in read.Scalars("peak/all_layers")]
    assert peaks == pytest.approx(monitor.history.peak.mean(dim=(1, 2)).tolist())
    assert read.Images("filters")[0].width > 100


def test_refuses():
    with pytest.raises(TypeError, match="report must be what init_vit_ returned, got SimpleViT"):
        convinit.DriftMonitor(build()[0])
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        convinit.DriftMonitor(build()[1], every=0)
