"""LeMiCa (arXiv 2511.00090) for FLUX.2: which denoising steps run the transformer, and how the others are predicted.

Independent of services, requests and image files. ``cached_transformer`` and ``calibration`` work with any object that
has the submodules of diffusers' ``Flux2Transformer2DModel``. Only these two need torch, and they are imported lazily.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from generator_service.lemica.calibration.fitting import with_fitted_predictor
from generator_service.lemica.calibration.graph import ErrorGraph
from generator_service.lemica.calibration.path import (
    cheapest_within,
    lexicographic_minimax_path,
    lexicographic_minimax_paths,
    minimum_total_error_path,
    schedule_of,
)
from generator_service.lemica.calibration.refinement import refine, with_step_added, with_step_removed
from generator_service.lemica.errors import (
    BadGraph,
    CalibrationMismatch,
    LemicaError,
    NoSuchPath,
    ScheduleMismatch,
    TransformerMismatch,
)
from generator_service.lemica.predictor import PREDICTORS, FeatureKind, Fitted, Linear, Predictor, Reuse
from generator_service.lemica.registry import SHIPPED, ScheduleRegistry, load_registry
from generator_service.lemica.schedule import (
    PUBLISHED,
    Schedule,
    load_schedules,
    published_size,
    save_schedules,
    schedule_for,
)
from generator_service.lemica.signature import Signature

if TYPE_CHECKING:
    from generator_service.lemica.cached_transformer import CachedTransformer, TimeEmbeddings
    from generator_service.lemica.calibration.measure import Calibration, num_forwards
    from generator_service.lemica.calibration.trajectory import Trajectory, TrajectoryRecorder
    from generator_service.lemica.check import check_transformer, small_example

NEED_TORCH = {
    "CachedTransformer": "cached_transformer",
    "TimeEmbeddings": "cached_transformer",
    "check_transformer": "check",
    "small_example": "check",
    "Calibration": "calibration.measure",
    "Trajectory": "calibration.trajectory",
    "TrajectoryRecorder": "calibration.trajectory",
    "num_forwards": "calibration.measure",
}

__all__ = [
    "PREDICTORS",
    "PUBLISHED",
    "SHIPPED",
    "BadGraph",
    "CachedTransformer",
    "Calibration",
    "CalibrationMismatch",
    "ErrorGraph",
    "FeatureKind",
    "Fitted",
    "LemicaError",
    "Linear",
    "NoSuchPath",
    "Predictor",
    "Reuse",
    "Schedule",
    "ScheduleMismatch",
    "ScheduleRegistry",
    "Signature",
    "TimeEmbeddings",
    "Trajectory",
    "TrajectoryRecorder",
    "TransformerMismatch",
    "cheapest_within",
    "check_transformer",
    "lexicographic_minimax_path",
    "lexicographic_minimax_paths",
    "load_registry",
    "load_schedules",
    "minimum_total_error_path",
    "num_forwards",
    "published_size",
    "refine",
    "save_schedules",
    "schedule_for",
    "schedule_of",
    "small_example",
    "with_fitted_predictor",
    "with_step_added",
    "with_step_removed",
]


def __getattr__(name: str) -> Any:
    """Import the names in ``NEED_TORCH`` on first access."""
    if name not in NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{NEED_TORCH[name]}"), name)
