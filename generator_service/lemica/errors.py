"""The errors of LeMiCa. Their texts are for people.

LemicaError
├── ScheduleMismatch      a schedule cannot be made, or was made for something else
├── BadGraph              a file or its errors form no graph
├── NoSuchPath            no path meets what was asked for
├── CalibrationMismatch   samples or a checkpoint do not belong together
└── TransformerMismatch   the transformer is not built as reuse needs it
"""


class LemicaError(ValueError):
    """What all of them are."""


class ScheduleMismatch(LemicaError):
    """A schedule cannot be made, or was made for a run of another kind."""


class BadGraph(LemicaError):
    """The file is not an error graph, or the errors do not form one."""


class NoSuchPath(LemicaError):
    """No path meets what was asked for; the text says what would."""


class CalibrationMismatch(LemicaError):
    """The samples cannot be calibrated together, or an interrupted calibration was of something else."""


class TransformerMismatch(LemicaError):
    """The transformer is not built as reuse needs it: the library has changed, or this is another model."""
