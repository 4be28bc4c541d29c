"""AutoDual: certify, train and check neural networks through their Fenchel dual."""

from autodual.bounds.linear_program import Relaxation
from autodual.cascade import Cascade, CascadeReport
from autodual.errors import AutoDualError, CertificateError, SpecificationError, TraceError, TrainingError
from autodual.errors import UnsupportedOperatorError
from autodual.losses import RobustLoss
from autodual.methods import IBP, LP, Adaptive, Auto, Dual, Optimized, Projected
from autodual.network import BoundModule, certify
from autodual.normalize import Normalize
from autodual.regions import L1, L2, Box, LInf, Region
from autodual.report import Report, Verdict
from dual_layers import NONE, REAL, ROUNDED, Guarantee, probabilistic
from dual_layers import Interval as Bounds

__version__ = "0.1.0"

__all__ = [
    "Adaptive", "Auto", "AutoDualError", "BoundModule", "Bounds", "Box", "Cascade", "CascadeReport", "CertificateError", "Dual",
    "Guarantee", "IBP", "L1", "L2", "LInf", "LP", "NONE", "Normalize", "Optimized", "Projected", "REAL", "ROUNDED", "Region",
    "Relaxation", "Report", "RobustLoss", "SpecificationError", "TraceError", "TrainingError", "UnsupportedOperatorError",
    "Verdict", "certify", "probabilistic",
]
