"""Least-squares weights of a ``Fitted`` predictor, from inner products of features alone: no model is needed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from generator_service.lemica.errors import BadGraph
from generator_service.lemica.graph import ErrorGraph
from generator_service.lemica.predictor import Fitted
from generator_service.lemica.schedule import Schedule

RIDGE = 1e-9
"""Against the mean square of a trace: steps next to each other leave almost the same one."""


def fit_weights(gram: Any, past: Sequence[int], step: int) -> tuple[float, ...]:
    """The weights, newest first, with which the features of ``past`` (oldest first) come nearest to that of ``step``.

    Args:
        gram: inner products of the features at every two steps, ``[T, T]``, summed over the samples.
        past: computed steps.
        step: the step that is predicted.
    """
    products = np.asarray(gram, dtype=np.float64)
    newest_first = list(reversed(past))
    matrix = products[np.ix_(newest_first, newest_first)]
    matrix = matrix + RIDGE * np.trace(matrix) / len(past) * np.eye(len(past))
    return tuple(np.linalg.solve(matrix, products[newest_first, step]).tolist())


def with_fitted_predictor(schedule: Schedule, graph: ErrorGraph) -> Schedule:
    """``schedule`` with weights for each of its predicted steps.

    Raises:
        BadGraph: the graph was saved without inner products.
    """
    if not graph.gram:
        raise BadGraph("this graph holds no inner products to fit a predictor with")
    weights: dict[int, tuple[float, ...]] = {}
    past: list[int] = []
    for step in range(schedule.num_steps):
        if schedule.is_computed(step):
            past = [*past, step][-Fitted.num_past :]
        else:
            weights[step] = fit_weights(graph.gram, past, step)
    return replace(schedule, predictor=Fitted(weights))
