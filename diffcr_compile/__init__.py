"""One line makes a Diffusion Transformer learn where to spend its compute: which tokens, layers and timesteps."""

from .config import CalibrationConfig, DiffCRConfig
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
from .table import ratios, set_ratios
from .transform import restore, transform
