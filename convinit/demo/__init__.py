"""`convinit demo`: what initial weights do to a small Vision Transformer on real images."""

from convinit.demo.arms import ARMS, QUICK, Arm, build_model
from convinit.demo.runs import Settings, load_maps, load_runs, run_demo, save_runs
from convinit.demo.summary import summarize

__all__ = [
    "ARMS",
    "QUICK",
    "Arm",
    "Settings",
    "build_model",
    "load_maps",
    "load_runs",
    "run_demo",
    "save_runs",
    "summarize",
]
