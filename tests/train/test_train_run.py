"""What a training run computes, against the same written out."""

from __future__ import annotations

import importlib.util
import math
import pickle
import resource
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training import SMALL, final_tensors, records, small

from convinit.serve.trained import load_trained
from convinit.train import checkpoint
from convinit.train import run as driver
from convinit.train.build import build_model, create_timm
from convinit.train.config_files import resolve
from convinit.train.data import Augmented, augmentation, load_data, train_loader
from convinit.train.engine import Engine, make_accelerator
from convinit.train.optim import MovingAverage, make_optimizer, make_schedule
from convinit.train.records import Records, read_records
from convinit.train.run import RunInterrupted, Watcher, measure, run_training

DIGITS = {"image_size": 8, "channels": 1, "num_classes": 10}


def test_a_run_is_the_loop_written_out(tmp_path):
    config = small(model__options={}, recipe__label_smoothing=0.1, recipe__epochs=2)
    run_training(config, tmp_path)

    data = load_data("digits", train_count=110)
    images = Augmented(data.train, augmentation("none", data))
    model = build_model(config, **DIGITS)
    average = {name: each.clone() for name, each in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.01)
    step, means = 0, []
    for epoch in range(2):
        total = 0.0
        for x, y in train_loader(images, 32, seed=0, epoch=epoch):
            lr = 1e-6 + (0.01 - 1e-6) * step / 2  # half an epoch of warm-up, in place of the cosine's start
            if step >= 2:
                lr = 0.005 * (1 + math.cos(math.pi * step / 8))
            optimizer.param_groups[0]["lr"] = lr
            loss = F.cross_entropy(model(x), y, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                for name, each in model.named_parameters():
                    average[name].copy_(each if step == 0 else 0.9 * average[name] + 0.1 * each)
            total += loss.item() * len(y)
            step += 1
        means.append(total / 110)
    got = final_tensors(tmp_path)
    for name, each in model.named_parameters():
        torch.testing.assert_close(got[f"model/{name}"], each.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[f"ema/{name}"], average[name], rtol=1e-4, atol=1e-5)
    epochs = [record for record in records(tmp_path) if record["kind"] == "epoch"]
    assert [record["loss"] for record in epochs] == pytest.approx(means, rel=1e-4)

    x, y = zip(*Augmented(data.test, augmentation("none", data)), strict=True)
    with torch.no_grad():
        logits = model.eval()(torch.stack(x))
    ranks = (logits.argsort(dim=1, descending=True) == torch.tensor(y)[:, None]).double()
    assert epochs[-1]["top1"] == pytest.approx(ranks[:, 0].mean().item(), abs=2e-3)
    assert epochs[-1]["top5"] == pytest.approx(ranks[:, :5].sum(dim=1).mean().item(), abs=2e-3)


@pytest.mark.gpu
def test_a_run_on_a_gpu_keeps_its_state(tmp_path):
    """A SimpleViT's extra state is on the CPU, its weights are not; both are checked before a save."""
    result = run_training(small(run__cpu=False, recipe__epochs=1), tmp_path)
    assert result.checkpoint is not None and final_tensors(tmp_path)


@pytest.mark.slow
def test_it_learns(tmp_path):
    config = resolve(
        "quick",
        given={
            "recipe.epochs": 3,
            "recipe.lr": 4e-3,
            "recipe.batch_size": 32,
            "run.tracker": "none",
            "run.threads": "none",
        },
    )
    assert run_training(config, tmp_path).figures["top1"] > 0.7


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe__optimizer": "sgd", "recipe__schedule": "constant", "recipe__clip": "none"},
        {"recipe__optimizer": "adam", "recipe__schedule": "one-cycle", "recipe__warmup_epochs": 0},
        {"recipe__precision": "bf16", "recipe__decay": "matrices", "recipe__drop_last": True},
        {"data__augment": "paper", "data__aug_repeats": 3, "recipe__cooldown_epochs": 1},
        {"model__name": "convmixer", "model__heads": "none",
         "model__mlp_dim": "none", "model__options": {}, "model__share_layers": True, "model__depth": 2},
    ],
)  # fmt: skip
def test_other_recipes_resume_exactly(changes, tmp_path):
    """SGD's momentum, one-cycle's betas, BatchNorm's statistics and tied weights are in checkpoints too."""
    if "data__augment" in changes:
        pytest.importorskip("torchvision")
    config = small(recipe__epochs=2, **changes)

    class Stop(Watcher):
        def saved(self, checkpoint: Path) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(config, tmp_path / "stopped", watcher=Stop())
    run_training(config, tmp_path / "stopped")
    run_training(config, tmp_path / "whole")
    ours, theirs = final_tensors(tmp_path / "stopped"), final_tensors(tmp_path / "whole")
    assert (
        all(torch.equal(ours[name], each) for name, each in theirs.items()) and ours.keys() == theirs.keys()
    )


@pytest.mark.slow
def test_compiled_is_eager_to_rounding(tmp_path):
    for name in ("compiled", "eager"):
        config = small(recipe__compile=name == "compiled", model__options={}, recipe__epochs=2)
        run_training(config, tmp_path / name)
    eager = final_tensors(tmp_path / "eager")
    for name, each in final_tensors(tmp_path / "compiled").items():
        torch.testing.assert_close(each, eager[name], rtol=1e-3, atol=1e-4)


def test_whole_epochs_between_tests_and_checkpoints(tmp_path):
    changes = {"run.checkpoint_steps": "none", "run.checkpoint_epochs": 2, "run.eval_every": 2, "run.keep": 9}
    run_training(resolve("quick", given=SMALL | changes), tmp_path)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-000008", "step-000012"]
    tested = [("top1" in record, "ema_top5" in record) for record in records(tmp_path) if "top1" in record or
              record["kind"] == "epoch"]  # fmt: skip
    assert tested == [(False, False), (True, True), (True, True)]


def test_epochs_are_validated_and_the_test_images_are_met_once(tmp_path):
    config = small(data__val_fraction=0.3)
    result = run_training(config, tmp_path)
    epochs = [record for record in records(tmp_path) if record["kind"] == "epoch"]
    tested = [("val_top1" in record, "ema_val_top5" in record, "top1" in record) for record in epochs]
    assert tested == [(True, True, False), (True, True, False), (True, True, True)]
    assert epochs[-1]["best_val_top1"] == max(record["val_top1"] for record in epochs)
    assert not any("best_top1" in record for record in epochs)

    engine = Engine(config, make_accelerator(config), result.checkpoint)
    plan = engine.plan()
    assert (plan.train_images, plan.val_images, plan.test_images) == (110, 300, 797)
    held_out = load_data("digits", val_fraction=0.3).val
    hits = 0
    with torch.no_grad():
        images, labels = Augmented(held_out, augmentation("none", engine.data)).batch(range(300))
        hits = (engine.inner.eval()(images).argmax(dim=1) == labels).sum().item()
    assert epochs[-1]["val_top1"] == pytest.approx(hits / 300)
    assert engine.evaluate()["top1"] == epochs[-1]["top1"]

    # The best weights are kept, and a model can be made of them alone.
    assert sorted(path.suffix for path in (tmp_path / "best").iterdir()) == [
        "",
        ".json",
        ".safetensors",
        ".toml",
    ]
    engine.inner.load_state_dict(checkpoint.read_tensors(tmp_path / "best", "model"))
    assert engine.evaluate(val=True)["val_top1"] == epochs[-1]["best_val_top1"]
    assert engine.evaluate()["top1"] == epochs[-1]["top1_of_best"]
    assert load_trained(tmp_path / "best").network is not None


def test_the_best_weights_are_of_an_earlier_epoch(tmp_path, monkeypatch):
    evaluate, shares = Engine.evaluate, iter([0.2, 0.6, 0.5])

    def scripted(self, *args, val=False, **options):
        figures = evaluate(self, *args, val=val, **options)
        return {**figures, "val_top1": next(shares)} if val else figures

    monkeypatch.setattr(Engine, "evaluate", scripted)
    seen = []

    class Seen(Watcher):
        def recorded(self, record):
            if record["kind"] == "epoch":
                seen.append(checkpoint.read_tensors(tmp_path / "best", "model"))

    figures = run_training(small(data__val_fraction=0.3), tmp_path, watcher=Seen()).figures
    first, second, last = seen
    assert any(not torch.equal(second[name], each) for name, each in first.items())
    assert all(torch.equal(last[name], each) for name, each in second.items())
    assert figures["best_val_top1"] == 0.6
    final = checkpoint.read_tensors(checkpoint.checkpoints(tmp_path)[-1], "model")
    assert any(not torch.equal(last[name], each) for name, each in final.items())
    monkeypatch.setattr(Engine, "evaluate", evaluate)
    config = small(data__val_fraction=0.3)
    engine = Engine(config, make_accelerator(config))
    for weights, name in ((last, "top1_of_best"), (final, "top1")):
        engine.inner.load_state_dict(weights)
        assert engine.evaluate()["top1"] == figures[name]


def test_best_weights_that_somebody_removed_do_not_end_a_run(tmp_path):
    config = small(data__val_fraction=0.3, run__checkpoint_steps=4)

    class Removing(Watcher):
        def saved(self, checkpoint):
            shutil.rmtree(tmp_path / "best", ignore_errors=True)

    figures = run_training(config, tmp_path, watcher=Removing()).figures
    assert figures["epoch"] == 3 and figures["best_val_top1"] == figures["val_top1"]
    assert figures["top1_of_best"] == figures["top1"]


def test_a_kill_between_two_renames_leaves_the_best_weights(tmp_path):
    run_training(small(data__val_fraction=0.3), tmp_path)
    kept = checkpoint.read_tensors(tmp_path / "best", "model")
    (tmp_path / "best").rename(tmp_path / ".unfinished-old-best")
    checkpoint.clean(tmp_path)
    for name, each in checkpoint.read_tensors(tmp_path / "best", "model").items():
        assert torch.equal(each, kept[name])


@pytest.mark.parametrize("schedule", [{}, {"recipe__schedule": "one-cycle", "recipe__warmup_epochs": 0}])
def test_a_finished_run_goes_on_for_longer(schedule, tmp_path):
    run_training(small(recipe__epochs=2, **schedule), tmp_path / "a")
    longer = small(recipe__epochs=4, **schedule)
    result = run_training(longer, tmp_path / "a")
    assert (result.steps, result.figures["epoch"]) == (8, 4)
    run_training(longer, tmp_path / "b")

    def rates(name):
        return {
            r["step"]: r["lr"] for r in records(tmp_path / name) if r["kind"] == "train" and r["step"] > 8
        }

    assert rates("a") == pytest.approx(rates("b")) and len(rates("a")) >= 3
    with pytest.raises(ValueError, match="recipe.epochs: 2, not 4"):
        run_training(small(recipe__epochs=2, **schedule), tmp_path / "a")


def test_the_clock_asks_for_checkpoints(tmp_path):
    run_training(small(run__checkpoint_steps="none", run__checkpoint_minutes=1e-9, run__keep=99), tmp_path)
    assert len(checkpoint.checkpoints(tmp_path)) == 12


# --- what goes wrong ----------------------------------------------------------------------------------------


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    original = Engine.step

    def poisoned(self, images, labels):
        original(self, images * (math.nan if self.progress.step == 6 else 1), labels)

    monkeypatch.setattr(Engine, "step", poisoned)
    with pytest.raises(
        FloatingPointError,
        match=r"loss became nan at step 7 \(epoch 2, learning rate .*, gradient norm nan; last losses "
        r"[\d., ]+nan\).*step-000006 is kept",
    ):
        run_training(small(), tmp_path)
    assert all(each.isfinite().all() for each in final_tensors(tmp_path).values())
    monkeypatch.undo()
    run_training(small(), tmp_path)


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    original = Engine.step

    def poisoned(self, images, labels):
        original(self, images, labels)
        if self.progress.step == 2:  # behind the loss, which does not show it yet
            with torch.no_grad():
                next(self.inner.parameters()).fill_(math.inf)

    monkeypatch.setattr(Engine, "step", poisoned)
    with pytest.raises(FloatingPointError, match="NaN or infinite by step 2 .*no checkpoint had been made"):
        run_training(small(), tmp_path)
    assert checkpoint.checkpoints(tmp_path) == []


def test_a_disk_that_is_full_while_writing(tmp_path):
    """The kernel refuses the write; the run says so, and what was there stays."""
    run_training(small(recipe__epochs=1, run__checkpoint_steps="none"), tmp_path)
    kept = final_tensors(tmp_path)
    big = {"model": {"weight": torch.zeros(1_000_000)}}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(
            OSError, match="step-000009 could not be written: .*step-000004 is intact. Make room"
        ):
            checkpoint.save(tmp_path, 9, big, {}, "", keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.glob(".unfinished*"))
    assert all(torch.equal(each, kept[name]) for name, each in final_tensors(tmp_path).items())


def test_room_is_looked_for_before_the_first_step(tmp_path, monkeypatch):
    usage = checkpoint.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    monkeypatch.setattr(Engine, "step", lambda *_: pytest.fail("a step was made"))
    with pytest.raises(OSError, match="has 0.1 MB free, but 3 more checkpoints of .* MB need .*run.keep"):
        run_training(small(), tmp_path)
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file cannot be written: .*--out"):
        run_training(small(), tmp_path / "file")


def test_the_estimate_of_a_checkpoint_is_its_size(tmp_path):
    config = small(recipe__epochs=1)
    run_training(config, tmp_path)
    size = sum(path.stat().st_size for path in checkpoint.checkpoints(tmp_path)[-1].iterdir())
    estimate = Engine(config, make_accelerator(config)).checkpoint_bytes()
    assert size <= estimate < size + 100_000


def test_no_pickle_is_read_or_written(tmp_path):
    run_training(small(recipe__epochs=1), tmp_path)
    names = {path.name for path in checkpoint.checkpoints(tmp_path)[-1].iterdir()}
    assert names == {
        "model.safetensors", "ema.safetensors", "optimizer.safetensors", "config.toml", "progress.json",
        "SHA256SUMS",
    }  # fmt: skip
    code = Path(driver.__file__).parent
    assert not any(
        "torch.load" in path.read_text() or "pickle." in path.read_text() for path in code.glob("*.py")
    )


def test_records_are_cut_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = Records(path)
    first.append({"step": 1})
    length = first.sync()
    first.append({"step": 2})
    first.close()
    path.write_bytes(path.read_bytes() + b'{"st')
    again = Records(path, length)
    again.append({"step": 3})
    again.close()
    assert read_records(path) == [{"step": 1}, {"step": 3}]


# --- the parts ----------------------------------------------------------------------------------------------


def test_measure_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan, seconds = measure(small(), seconds=0.1)
    assert (plan.steps_per_epoch, plan.steps, plan.train_images, plan.image) == (4, 12, 110, (1, 8, 8))
    assert 0 < seconds < 10 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("variant", ["vanilla", "I", "II", "III"])
@pytest.mark.parametrize("init", ["impulse", "mimetic", "default", "norm_matched"])
def test_simple_vit_by_config(variant, init):
    config = small(model__variant=variant, init__method=init, run__seed=3)
    first, again = (build_model(config, **DIGITS).state_dict() for _ in range(2))
    assert all(torch.equal(each, again[name]) for name, each in first.items())
    assert build_model(config, **DIGITS).blocks[0].attn.variant == variant
    other = build_model(small(model__variant=variant, init__method=init, run__seed=4), **DIGITS)
    assert not torch.equal(other.head.weight, first["head.weight"])


def test_unknown_options_of_a_model_are_errors():
    with pytest.raises(ValueError, match="model 'simple_vit' does not take these settings: .*no_such"):
        build_model(small(model__options={"no_such": 1}), **DIGITS)


def test_timm_by_config():
    pytest.importorskip("timm")
    given = {"model.name": "vit_tiny_patch16_224", "model.options": {"depth": 2}, "model.patch_size": 8}
    states = {}
    for method in ("impulse", "default"):
        config = resolve(given={**given, "init.method": method, "run.seed": 5})
        state = torch.random.get_rng_state()
        model = build_model(config, image_size=(32, 32), channels=3, num_classes=7)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert model.pos_embed.shape == (1, 17, 192) and model.head.out_features == 7
        assert torch.equal(build_model(config, image_size=(32, 32), channels=3, num_classes=7).head.weight,
                           model.head.weight)  # fmt: skip
        states[method] = model.state_dict()
    changed = {
        name for name, each in states["impulse"].items() if not torch.equal(each, states["default"][name])
    }
    writers = ("patch_embed.proj", "cls_token", "attn.proj", "mlp.fc2")  # to P's subspace, which they leave
    assert {"pos_embed", "blocks.1.attn.qkv.weight", "blocks.1.mlp.fc2.weight"} <= changed
    assert all(any(part in name for part in ("pos_embed", "attn.qkv", *writers)) for name in changed)
    with pytest.raises(ValueError, match="got .*; did you mean .*vit_tiny_patch16_224 or "):
        build_model(resolve(given={"model.name": "vit_tinny_patch16_224"}), **DIGITS)


def test_timms_mlp_mixer_by_config():
    """timm's functions take none of these sizes; what is not set is the named model's."""
    timm = pytest.importorskip("timm")
    given = {"model.name": "mixer_s32_224", "model.patch_size": 4, "model.options": {"num_blocks": 2}}
    model = build_model(resolve(given=given), image_size=(32, 32), channels=1, num_classes=7)
    assert len(model.blocks) == 2 and model.embed_dim == 512 and model.stem.proj.weight.shape[1:] == (1, 4, 4)
    read = model.blocks[0].mlp_tokens.fc1.weight  # 256 units read 64 tokens: four impulses
    assert read.shape == (256, 64) and ((read == 0) | (read == 1)).all() and read.sum(dim=1).max() == 1
    with pytest.raises(ValueError, match="'mixer_s32_224' does not take these settings: .*depth"):
        wrong = resolve(given={**given, "model.options": {"depth": 2}})
        build_model(wrong, image_size=(32, 32), channels=1, num_classes=7)
    with torch.device("meta"):
        for name in timm.list_models("mixer_*"):
            named = timm.create_model(name)
            ours = create_timm(name, {"patch_size": named.stem.patch_size})
            assert [each.shape for each in ours.parameters()] == [each.shape for each in named.parameters()]


def test_decay_of_matrices_spares_the_rest():
    model = build_model(small(), **DIGITS)
    decayed, spared = make_optimizer(model, small(recipe__decay="matrices").recipe).param_groups
    assert all(each.dim() >= 2 for each in decayed["params"]) and decayed["weight_decay"] == 0.01
    assert all(each.dim() < 2 for each in spared["params"]) and spared["weight_decay"] == 0
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))
    with pytest.raises(ValueError, match="parameters that are trained, got none"):
        make_optimizer(model.requires_grad_(False), small().recipe)


def test_the_average_has_statistics_of_its_own():
    model = nn.Sequential(nn.BatchNorm1d(2))
    model.register_buffer("index", torch.tensor([3, 7]))
    average = MovingAverage(model, 0.75)
    want = None
    for step in range(4):
        model(
            torch.full((3, 2), float(step)) + torch.randn(3, 2, generator=torch.Generator().manual_seed(step))
        )
        average.update_parameters(model)
        now = model[0].running_var.double()
        want = now if want is None else 0.75 * want + 0.25 * now
    torch.testing.assert_close(average.module[0].running_var.double(), want, rtol=1e-6, atol=1e-6)
    assert not torch.equal(average.module[0].running_mean, model[0].running_mean)
    assert average.module.index.tolist() == [3, 7] and int(average.module[0].num_batches_tracked) == 4


def test_schedules_end_where_they_should():
    for name, after_warmup, end in (("cosine", 0.007525, 1e-4), ("constant", 0.01, 0.01)):
        recipe = small(recipe__schedule=name, recipe__min_lr=1e-4, recipe__warmup_epochs=1).recipe
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=recipe.lr)
        schedule = make_schedule(optimizer, recipe, 10)
        rates = []
        for _ in range(30):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert rates[0] == pytest.approx(1e-6) and rates[10] == pytest.approx(after_warmup)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(end)


@pytest.mark.parametrize("mix", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixing_repeats_itself(mix, tmp_path):
    pytest.importorskip("torchvision")
    changes = {f"recipe__{name}": value for name, value in mix.items()}
    config = small(recipe__epochs=1, **changes)
    for name in ("a", "b"):
        torch.manual_seed(len(name) * 7)
        run_training(config, tmp_path / name)
    first, second = final_tensors(tmp_path / "a"), final_tensors(tmp_path / "b")
    assert all(torch.equal(each, second[name]) for name, each in first.items())
    run_training(small(recipe__epochs=1), tmp_path / "plain")
    plain = final_tensors(tmp_path / "plain")
    assert any(not torch.equal(each, plain[name]) for name, each in first.items())


def test_mixing_without_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    config = small(recipe__mixup=0.8)
    with pytest.raises(ImportError, match="need torchvision"):
        Engine(config, make_accelerator(config))


@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="needs tensorboard")
def test_tensorboard_is_written(tmp_path):
    run_training(small(recipe__epochs=1, run__tracker="auto"), tmp_path)
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="tracker is wandb, which is not installed"):
        run_training(small(run__tracker="wandb"), tmp_path)


def test_an_interruption_passes_between_processes():
    told = pickle.loads(pickle.dumps(RunInterrupted(15, Path("step-000003"))))
    assert (told.signum, told.checkpoint) == (15, Path("step-000003"))
    assert str(told) == "stopped by signal 15; saved step-000003"
