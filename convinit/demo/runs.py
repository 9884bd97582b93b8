"""Running the demo: every arm with every seed, several at once, each kept on disk as soon as it is done."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import convinit
from convinit._checks import check_int
from convinit._files import write_whole
from convinit._processes import in_processes
from convinit.demo.arms import ARMS, GRID_SIZE, OURS, build_model
from convinit.models import SimpleViT
from convinit.nn import ConvInitAttention
from convinit.offsets import attention_on_targets

SHIFTS = {"down": (1, 0), "up": (-1, 0), "right": (0, 1), "left": (0, -1)}
MAP_IMAGES = 64  # test images over which attention maps are averaged

Run = dict[str, Any]
OnEpoch = Callable[[str, int, int], None]  # arm, seed, epoch


@dataclass(frozen=True)
class Settings:
    """What all runs share.

    Attributes:
        epochs: passes over the training images.
        num_train, num_test: images; num_test = None means all that are left.
        split_seed: of the split; the same for all runs.
        batch_size, lr, weight_decay: of AdamW under a one-cycle schedule.
    """

    epochs: int = 8
    num_train: int = 1000
    num_test: int | None = None
    split_seed: int = 0
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.01


def run_demo(
    out: Path,
    arms: Sequence[str],
    seeds: Sequence[int],
    settings: Settings,
    *,
    jobs: int = 1,
    resume: bool = True,
    on_plan: Callable[[int], None] | None = None,
    on_epoch: OnEpoch | None = None,
    on_run: Callable[[Run], None] | None = None,
) -> list[Run]:
    """Runs what is not on disk yet, seed by seed, and returns all runs asked for.

    `out`/results.json holds every run that was finished in this folder, whatever its settings; a run is
    taken from there when arm, seed, settings and versions are the same. It is rewritten, whole or not at all,
    after every run: an interruption loses only the runs in progress.

    Args:
        out: folder, made if missing.
        arms: keys of `ARMS`.
        seeds: of initial weights and of the order of the images.
        settings: what all runs share.
        jobs: processes that run at once; 1 runs here. Each run has one thread.
        resume: False runs all of it again and replaces what is on disk.
        on_plan: told how many runs were found on disk, before the first one starts.
        on_epoch: told arm, seed and epoch whenever one is done.
        on_run: told a run when it is done.

    Raises:
        ValueError: an arm does not exist, or results.json is not ours.
        OSError: `out` cannot be written.
        RuntimeError: a process died, for example for want of memory.
    """
    for arm in arms:
        if arm not in ARMS:
            raise ValueError(f"arms must be among {', '.join(ARMS)}, got {arm!r}")
    check_int("jobs", jobs)
    out.mkdir(parents=True, exist_ok=True)
    known = load_runs(out)
    wanted = [(arm, seed) for seed in seeds for arm in arms]
    identities = {pair: _identity(*pair, settings) for pair in wanted}
    done: dict[tuple[str, int], Run] = {}
    if resume:
        on_disk = {_key(run["identity"]): run for run in known}
        found = {pair: on_disk.get(_key(identity)) for pair, identity in identities.items()}
        done = {pair: run for pair, run in found.items() if run is not None and _has_maps(out, run)}
    save_runs(out, known)  # an unwritable folder shows now, not after the first run

    def finished(run: Run) -> None:
        pair = run["identity"]["arm"], run["identity"]["seed"]
        done[pair] = run
        known[:] = [old for old in known if _key(old["identity"]) != _key(run["identity"])] + [run]
        save_runs(out, known)
        if on_run is not None:
            on_run(run)

    missing = [pair for pair in wanted if pair not in done]
    on_epoch = on_epoch or (lambda arm, seed, epoch: None)
    if on_plan is not None:
        on_plan(len(done))
    in_processes(
        run_one,
        [(arm, seed, settings, out) for arm, seed in missing],
        on_tick=on_epoch,
        on_done=finished,
        workers=[{}] * jobs,
    )
    return [done[pair] for pair in wanted]


def run_one(arm_key: str, seed: int, settings: Settings, out: Path, on_epoch: OnEpoch) -> Run:
    """Trains one arm with one seed and measures it; the maps of seed 0 of our own arm go to `out`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small are slower with more, and so the number cannot matter
    try:
        return _run_one(arm_key, seed, settings, out, on_epoch)
    finally:
        torch.set_num_threads(threads)


def _run_one(arm_key: str, seed: int, settings: Settings, out: Path, on_epoch: OnEpoch) -> Run:
    from convinit.train import accuracy, batches, load_digits_split, shift_images, train
    from convinit.train.accelerator import plain_accelerator

    start, cpu_start = time.perf_counter(), time.process_time()
    data = load_digits_split(settings.num_train, num_test=settings.num_test, seed=settings.split_seed)
    unit = data.train_images.std()  # pixels in standard deviations; the background stays 0
    train_images, test_images = data.train_images / unit, data.test_images / unit

    def test_batches(dy: int, dx: int) -> DataLoader:
        return batches(shift_images(test_images, dy, dx), data.test_labels, 128)

    identity = _identity(arm_key, seed, settings)
    order = torch.Generator().manual_seed(seed)
    model = build_model(ARMS[arm_key], data.num_classes, seed)
    before = _maps(model, test_images[:MAP_IMAGES])
    curve = []
    for record in train(
        model,
        batches(train_images, data.train_labels, settings.batch_size, shuffle=True, generator=order),
        test_batches(0, 0),
        epochs=settings.epochs,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        accelerator=plain_accelerator(cpu=True),  # too small for a GPU to help
    ):
        curve.append(asdict(record))
        on_epoch(arm_key, seed, record.epoch)

    after = _maps(model, test_images[:MAP_IMAGES])
    peaks: dict[str, float | None] = {"start": None, "trained": None}
    if before is not None and after is not None and ARMS[arm_key].options["method"] == "impulse":
        offsets = torch.stack(
            [layer.offsets for layer in model.modules() if isinstance(layer, ConvInitAttention)]
        )
        peaks = {
            name: attention_on_targets(maps.flatten(0, 1), offsets.flatten(0, 1), GRID_SIZE)
            for name, maps in (("start", before), ("trained", after))
        }
        if (arm_key, seed) == (OURS, 0):
            _save_maps(out, identity, {"offsets": offsets, "start": before, "trained": after})
    return {
        "identity": identity,
        "curve": curve,
        "accuracy": curve[-1]["accuracy"],
        "shifted": {name: accuracy(model, test_batches(*shift)) for name, shift in SHIFTS.items()},
        "peak": peaks,
        "test_images": len(test_images),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": {**convinit.build_info(), "machine": platform.machine()},
    }


def _save_maps(out: Path, identity: dict[str, Any], maps: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    path = _maps_path(out, identity)
    part = path.with_suffix(".part")
    save_file(maps, part)
    os.replace(part, path)


def load_maps(out: Path, run: Run) -> dict[str, Tensor]:
    """offsets [layers, heads, 2], and start and trained [layers, heads, N, N], of a run that kept them."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = _maps_path(out, run["identity"])
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and give the same command again") from error


def load_runs(out: Path) -> list[Run]:
    """The finished runs of a folder; none if it has no results.json."""
    path = out / "results.json"
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        if not all(isinstance(run, dict) and "identity" in run for run in runs):
            raise ValueError("its runs have no identity")
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not hold the results of a demo ({error}); move it away or choose another folder"
        ) from error
    return runs


def save_runs(out: Path, runs: Sequence[Run], **others: Any) -> None:
    """Writes results.json, whole or not at all."""
    write_whole(out / "results.json", json.dumps({**others, "runs": runs}, indent=1, ensure_ascii=False))


def _identity(arm: str, seed: int, settings: Settings) -> dict[str, Any]:
    """All that a run's figures depend on, save the machine."""
    return {
        "arm": arm,
        "seed": seed,
        "model": ARMS[arm].model,
        "options": dict(ARMS[arm].options),
        "settings": asdict(settings),
        "versions": {"convinit": convinit.__version__, "torch": torch.__version__},
    }


def _key(identity: dict[str, Any]) -> str:
    return json.dumps(identity, sort_keys=True)


def _maps_path(out: Path, identity: dict[str, Any]) -> Path:
    digest = hashlib.sha256(_key(identity).encode()).hexdigest()[:8]  # other settings, other maps
    return out / f"maps-{identity['arm']}-{digest}.safetensors"


def _has_maps(out: Path, run: Run) -> bool:
    identity = run["identity"]
    return (identity["arm"], identity["seed"]) != (OURS, 0) or _maps_path(out, identity).exists()


@torch.no_grad()
def _maps(model: nn.Module, images: Tensor) -> Tensor | None:
    """Attention averaged over some images, [layers, heads, N, N]; None for a model without attention."""
    if not isinstance(model, SimpleViT):
        return None
    return model.eval().attention_maps(images).mean(dim=1)
