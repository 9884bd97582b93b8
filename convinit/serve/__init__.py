"""Serving what was trained: loading, drawing, exporting and predicting (extras `train` and `export`)."""

from convinit.serve.export import FORMATS, export
from convinit.serve.pictures import draw_run
from convinit.serve.predict import Prediction, Unreadable, image_files, predict, read_batch
from convinit.serve.trained import ImageSpec, TrainedModel, load_trained, save_trained

__all__ = [
    "FORMATS",
    "ImageSpec",
    "Prediction",
    "TrainedModel",
    "Unreadable",
    "draw_run",
    "export",
    "image_files",
    "load_trained",
    "predict",
    "read_batch",
    "save_trained",
]
