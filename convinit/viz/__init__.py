"""Pictures of attention and of training, as matplotlib figures (extra `demo`).

Every function returns a `matplotlib.figure.Figure` that belongs to nobody: no window, no pyplot state, so it
works on any machine. Save it with `figure.savefig("maps.png", dpi=150)`.
Colours stay apart for colour-blind readers and in grey.

===================  ============================================================================
of plain tensors     ``attention_filter``  ``attention_filters``  ``attention_maps``  ``fit_filters``
of a whole model     ``head_maps``  ``model_filters``  ``model_maps``
of training          ``run_curves``  ``learning_curves``  ``drift``
of experiments       ``grid_lines``  ``grid_dots``  ``temperature_maps``
===================  ============================================================================
"""

from convinit.adapters.measure import head_maps
from convinit.viz.curves import drift, learning_curves, run_curves
from convinit.viz.grids import grid_dots, grid_lines
from convinit.viz.heads import attention_filter, attention_filters, attention_maps, fit_filters
from convinit.viz.model import model_filters, model_maps
from convinit.viz.temperature import temperature_maps

__all__ = [
    "attention_filter",
    "attention_filters",
    "attention_maps",
    "drift",
    "fit_filters",
    "grid_dots",
    "grid_lines",
    "head_maps",
    "learning_curves",
    "model_filters",
    "model_maps",
    "run_curves",
    "temperature_maps",
]
