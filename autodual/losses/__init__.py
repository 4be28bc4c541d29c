"""Losses over bounds, over attacks, and over both: each a module, so that wrappers around ``forward`` apply.

``LOSSES`` names them as the command line does. Every loss is called as ``loss(x, y, region, **numbers)``; what ``numbers``
a loss has, and their defaults, its class says in ``numbers``. A schedule moves them from call to call.
"""

from __future__ import annotations

from autodual.losses.base import Loss
from autodual.losses.certified import CROWNIBPLoss, EnvelopeLoss, IntervalLoss, RobustLoss
from autodual.losses.empirical import CleanLoss, FGSMLoss, PGDLoss, TRADESLoss
from autodual.losses.mixed import CCIBPLoss, MTLIBPLoss, SABRLoss

LOSSES: dict[str, type[Loss]] = {
    "clean": CleanLoss,
    "fgsm": FGSMLoss,
    "pgd": PGDLoss,
    "trades": TRADESLoss,
    "robust": RobustLoss,
    "interval": IntervalLoss,
    "crown-ibp": CROWNIBPLoss,
    "sabr": SABRLoss,
    "mtl-ibp": MTLIBPLoss,
    "cc-ibp": CCIBPLoss,
    "envelope": EnvelopeLoss,
}

__all__ = [
    "CCIBPLoss", "CROWNIBPLoss", "CleanLoss", "EnvelopeLoss", "FGSMLoss", "IntervalLoss", "LOSSES", "Loss", "MTLIBPLoss",
    "PGDLoss", "RobustLoss", "SABRLoss", "TRADESLoss",
]
