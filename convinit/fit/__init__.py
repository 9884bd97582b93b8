"""Fitting query and key weights so that attention starts as a given map."""

from convinit.fit.api import fit_qk, fit_targets
from convinit.fit.newton import Newton
from convinit.fit.papers import SVD, Adam
from convinit.fit.result import QKFit

__all__ = ["SVD", "Adam", "Newton", "QKFit", "fit_qk", "fit_targets"]
