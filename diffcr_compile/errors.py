"""The errors a user can meet. Each message says what was expected, what was found, where, and what to do."""


class DiffCRError(RuntimeError):
    """Parent of every error raised by this package on a user's model or data (bad arguments raise ValueError/TypeError)."""


class CaptureError(DiffCRError):
    """The model could not be run on the inputs it was given, or there were none when they were needed."""


class BlockNotFoundError(DiffCRError):
    """Nothing in the model can be routed; the message lists every candidate with the reason."""


class UnsupportedError(DiffCRError):
    """A call or a combination that the routed model cannot serve, with the way out."""


class AlreadyTransformedError(DiffCRError):
    """``transform`` on a model that is already routed."""


class NotTransformedError(DiffCRError):
    """An operation on routing, on a model that has none."""


class BudgetError(DiffCRError):
    """A budget that no table of ratios reaches; the message names the minimum."""


class CalibrationError(DiffCRError):
    """Learning could not go on: no batches, or values that are not finite."""


class ArtefactError(DiffCRError):
    """A saved routing that is damaged, newer than this package, or made for another model."""


class LoweringError(DiffCRError):
    """A combination of scope, mode and options that cannot be compiled."""
