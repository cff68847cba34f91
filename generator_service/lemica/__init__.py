"""LeMiCa (arXiv 2511.00090) for FLUX.2: which denoising steps are computed, and what the others do instead.

Knows nothing of services, requests or pictures. ``schedule`` needs no torch; ``cached_transformer`` wraps any object
with the parts of diffusers' ``Flux2Transformer2DModel``.
"""

from generator_service.lemica.cached_transformer import CachedTransformer, TransformerMismatch, check_transformer
from generator_service.lemica.schedule import PUBLISHED, Schedule, ScheduleMismatch, schedule_for

__all__ = [
    "PUBLISHED",
    "CachedTransformer",
    "Schedule",
    "ScheduleMismatch",
    "TransformerMismatch",
    "check_transformer",
    "schedule_for",
]
