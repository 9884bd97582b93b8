"""What a run of `convinit train` has done to its model, drawn from the run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from convinit.adapters import InitReport, init_vit_
from convinit.drift import DriftMonitor
from convinit.serve.trained import ImageSpec, load_trained
from convinit.train.build import build_with_report
from convinit.train.checkpoint import checkpoints, read_progress
from convinit.train.config import Config
from convinit.train.config_files import read_toml
from convinit.train.records import read_records
from convinit.train.run import METRICS
from convinit.viz import drift, head_maps, model_filters, run_curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT = "init_report"  # .txt and .json


def draw_run(out: str | Path, *, images: Tensor | None = None) -> list[Path]:
    """Draws a run and reports on its initial weights, from its records and its latest checkpoint.

    The model at the start is built anew, by the config and the seed of the checkpoint.

    Args:
        out: folder of the run; it gets

            * curves.png: loss and accuracy over the epochs, where metrics.jsonl is there;
            * init_report.txt and init_report.json: the heads at the start, as of :func:`convinit.init_vit_`;
            * filters.png: the mean attention around a query of each head, at the start and now;
            * drift.png: the attention on each head's target, at the start and now.

            The last three are of Vision Transformers alone, drift.png of those whose heads have targets.
        images: [B, C, H, W], as the model takes them: filters.png then shows the mean attention on them, and
            not that of the positions alone.

    Returns:
        The files that were written.

    Raises:
        FileNotFoundError: `out` holds no checkpoint. ValueError: images were given for a model without
            attention over a token grid. ImportError: matplotlib is missing.
    """
    out = Path(out)
    found = checkpoints(out)
    if not found:
        raise FileNotFoundError(f"{out} must be the folder of a run, but no checkpoint step-* is in it")
    network, report = _at_the_start(found[-1])
    if report is None and images is not None:
        raise ValueError(
            f"images must not be given for the run in {out}: its {type(network).__name__} has no attention "
            "that could be drawn"
        )
    written = []
    if report is not None:  # before what needs matplotlib
        for name, text in ((f"{REPORT}.txt", str(report)), (f"{REPORT}.json", report.to_json(indent=1))):
            (out / name).write_text(text + "\n", encoding="utf-8")
            written.append(out / name)
    files = {}
    if (out / METRICS).exists():
        files["curves.png"] = run_curves(read_records(out / METRICS), title=out.name)
    if report is not None:
        files |= _heads(network, report, found[-1], images)
    for name, figure in files.items():
        figure.savefig(out / name, dpi=150)
        written.append(out / name)
    return written


def of_what(images: Tensor | None) -> str:
    """What a picture of attention maps shows, in words."""
    return "by the positions alone" if images is None else f"mean over {len(images)} images"


def _at_the_start(checkpoint: Path) -> tuple[nn.Module, InitReport | None]:
    """The model as training found it, and the report of its attentions; None where it has none."""
    images = ImageSpec.of(read_progress(checkpoint)["images"], checkpoint / "progress.json")
    config = Config.of(read_toml(checkpoint / "config.toml"))
    network, report = build_with_report(
        config,
        image_size=images.image_size,
        channels=images.channels,
        num_classes=len(images.class_names),
    )
    if report is None:
        try:
            report = init_vit_(network, method="default", values="default")  # changes nothing
        except ValueError:
            return network, None
        options = {name: value for name, value in config.init.of_queries_keys().items() if value is not None}
        report.method = options.pop("method")
        report.options = {**options, "seed": config.run.seed}
    return network, report


def _heads(
    network: nn.Module, report: InitReport, checkpoint: Path, images: Tensor | None
) -> dict[str, Figure]:
    seen: Any = {} if images is None else {"model": network, "images": images}
    before, monitor = head_maps(report, **seen), DriftMonitor(report)
    network.load_state_dict(load_trained(checkpoint).network.state_dict())
    step: int = read_progress(checkpoint)["progress"]["step"]
    monitor.load_state_dict({**monitor.state_dict(), "step": step})
    monitor.record()
    title = f"Attention around a query, {of_what(images)}"
    figures = {"filters.png": model_filters(report, before, title=title, **seen)}
    if any(record.targets is not None for record in report.records):
        figures["drift.png"] = drift(monitor.history, title=f"The start, and step {step}")
    return figures
