"""The errors of LeMiCa. Their messages are safe to show to users.

LemicaError
├── ScheduleMismatch      a schedule is invalid, or was made for another kind of run
├── BadGraph              a file or its errors do not form an error graph
├── NoSuchPath            no path meets the request
├── CalibrationMismatch   samples, graphs or a checkpoint do not belong together
└── TransformerMismatch   the transformer does not support residual reuse
"""


class LemicaError(ValueError):
    """Base class of LeMiCa's errors."""


class ScheduleMismatch(LemicaError):
    """A schedule is invalid, or was made for another kind of run."""


class BadGraph(LemicaError):
    """The file is not an error graph, or the errors do not form one."""


class NoSuchPath(LemicaError):
    """No path meets the request; the message says what is possible."""


class CalibrationMismatch(LemicaError):
    """Samples cannot be calibrated together, or a checkpoint or graph belongs to another calibration."""


class TransformerMismatch(LemicaError):
    """The transformer does not support residual reuse: the library has changed, or this is another model."""
