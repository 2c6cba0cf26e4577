"""One line makes a Diffusion Transformer learn where to spend its compute: which tokens, layers and timesteps."""

from .artefact import load, save
from .calibration.report import CalibrationReport
from .calibration.train import calibrate
from .config import CalibrationConfig, DiffCRConfig
from .cost import Cost, cost
from .errors import (
    AlreadyTransformedError,
    ArtefactError,
    BlockNotFoundError,
    BudgetError,
    CalibrationError,
    CaptureError,
    DiffCRError,
    LoweringError,
    NotTransformedError,
    UnsupportedError,
)
from .explain import Explanation, explain
from .learning import Learnable, budget_loss, learning
from .lower import lower
from .observe import Trace, record, trace
from .region import reset
from .table import ratios, set_ratios
from .transform import restore, transform

__all__ = [
    "AlreadyTransformedError",
    "ArtefactError",
    "BlockNotFoundError",
    "BudgetError",
    "CalibrationConfig",
    "CalibrationError",
    "CalibrationReport",
    "CaptureError",
    "Cost",
    "DiffCRConfig",
    "DiffCRError",
    "Explanation",
    "Learnable",
    "LoweringError",
    "NotTransformedError",
    "Trace",
    "UnsupportedError",
    "budget_loss",
    "calibrate",
    "cost",
    "explain",
    "learning",
    "load",
    "lower",
    "ratios",
    "record",
    "reset",
    "restore",
    "save",
    "set_ratios",
    "trace",
    "transform",
]
