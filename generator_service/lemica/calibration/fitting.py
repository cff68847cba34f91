"""Least-squares weights for the ``Fitted`` predictor, from inner products of features; no model is needed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from generator_service.lemica.calibration.graph import ErrorGraph
from generator_service.lemica.errors import BadGraph
from generator_service.lemica.predictor import Fitted
from generator_service.lemica.schedule import Schedule

RIDGE = 1e-9
"""Regularization relative to the features' mean square: features of adjacent steps are almost collinear."""


def fit_weights(gram: Any, past: Sequence[int], step: int) -> tuple[float, ...]:
    """Fit the feature of ``step`` as a linear combination of the features of ``past``.

    Args:
        gram: inner products between the features of all pairs of steps, ``[T, T]``, summed over samples.
        past: computed steps, oldest first.
        step: the predicted step.

    Returns:
        One weight for each step of ``past``, newest first.
    """
    import numpy as np  # noqa: PLC0415 - planning schedules does without

    products = np.asarray(gram, dtype=np.float64)
    newest_first = list(reversed(past))
    matrix = products[np.ix_(newest_first, newest_first)]
    matrix = matrix + RIDGE * np.trace(matrix) / len(past) * np.eye(len(past))
    return tuple(np.linalg.solve(matrix, products[newest_first, step]).tolist())


def with_fitted_predictor(schedule: Schedule, graph: ErrorGraph) -> Schedule:
    """Return ``schedule`` with a ``Fitted`` predictor that has weights for each skipped step.

    Raises:
        BadGraph: the graph has no inner products.
    """
    if not graph.gram:
        raise BadGraph("this graph has no inner products, which fitting a predictor needs")
    weights: dict[int, tuple[float, ...]] = {}
    past: list[int] = []
    for step in range(schedule.num_steps):
        if schedule.is_computed(step):
            past = [*past, step][-Fitted.num_past :]
        else:
            weights[step] = fit_weights(graph.gram, past, step)
    return replace(schedule, predictor=Fitted(weights))
