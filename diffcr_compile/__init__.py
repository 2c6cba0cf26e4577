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
from .cost import Cost, cost
from .learning import Learnable, budget_loss, learning
from .lower import lower
from .observe import Trace, record, trace
from .calibration.report import CalibrationReport
from .calibration.train import calibrate
