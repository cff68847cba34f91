"""The error graph: the measured error of every edge, and its file format. Does not import torch.

Edge ``(i, j)``: steps i and j are computed, the steps between them are predicted from features cached at step i and
earlier, and every other step of the run is computed. Its error is the mean absolute difference of the final latents
from those of the full run (LeMiCa, section 3.2). Node ``num_steps`` is the end of the run: on an edge to it, all
remaining steps are predicted.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Self

from generator_service.lemica.errors import BadGraph
from generator_service.lemica.files import write_json
from generator_service.lemica.signature import Signature

FORMAT = "lemica-error-graph/1"
Edge = tuple[int, int]


@dataclass(frozen=True)
class ErrorGraph:
    """Errors of edges. ``(i, i + 1)`` skips nothing and defaults to 0; other missing edges may not be used."""

    num_steps: int
    errors: Mapping[Edge, float]
    signature: Signature | None = None
    samples: Mapping[Edge, tuple[float, ...]] = field(default_factory=dict)
    """The error of each edge on each calibration sample; ``errors`` is a summary of them."""
    gram: tuple[tuple[float, ...], ...] = ()
    """Inner products between the features of all pairs of steps, for ``Fitted`` predictors; may be empty."""
    is_exact: bool = True
    """Whether errors compare the final latents; otherwise they compare the latents where the skip ends."""

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise BadGraph("a graph has at least one step")
        for (i, j), error in self.errors.items():
            if not 0 <= i < j <= self.num_steps or not error >= 0 or error == float("inf"):
                raise BadGraph(f"edge ({i}, {j}) with error {error} does not belong to a run of {self.num_steps} steps")

    def error(self, edge: Edge) -> float | None:
        """Return the error of ``edge``, or None if it may not be used."""
        return self.errors.get(edge, 0.0 if edge[1] == edge[0] + 1 else None)

    def planned_for(self, statistic: str) -> "ErrorGraph":
        """Return the graph with another summary of its samples as errors: ``mean``, ``p90`` or ``worst``.

        Raises:
            BadGraph: the statistic is unknown, or the graph has no samples.
        """
        if statistic not in STATISTICS:
            raise BadGraph(f"the statistic must be one of {', '.join(STATISTICS)}, not {statistic}")
        if not self.samples:
            raise BadGraph("this graph has no errors of individual samples, which the statistic needs")
        summary = STATISTICS[statistic]
        errors = {edge: summary(sorted(values)) for edge, values in self.samples.items()}
        return replace(self, errors=errors)

    def save(self, path: Path | str) -> None:
        """Write the graph as JSON, atomically."""
        edges = [
            {"from": i, "to": j, "error": error, "samples": list(self.samples.get((i, j), ()))}
            for (i, j), error in sorted(self.errors.items())
        ]
        signature = self.signature.to_json() if self.signature else None
        header = {"format": FORMAT, "num_steps": self.num_steps, "signature": signature, "exact": self.is_exact}
        write_json(Path(path), header | {"edges": edges, "gram": [list(row) for row in self.gram]})

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a graph from a file that ``save`` wrote.

        Raises:
            BadGraph: the file is not an error graph.
        """
        try:
            data: dict[str, Any] = json.loads(Path(path).read_text())
            if data["format"] != FORMAT:
                raise BadGraph(f"{Path(path).name} has format {data['format']!r}, not {FORMAT}")
            edges = {(int(e["from"]), int(e["to"])): e for e in data["edges"]}
            signature = Signature(**data["signature"]) if data["signature"] else None
            samples = {edge: tuple(map(float, e["samples"])) for edge, e in edges.items() if e["samples"]}
            gram = tuple(tuple(map(float, row)) for row in data["gram"])
            errors = {edge: float(e["error"]) for edge, e in edges.items()}
            return cls(int(data["num_steps"]), errors, signature, samples, gram, bool(data.get("exact", True)))
        except (OSError, KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise BadGraph(f"{Path(path).name} is not an error graph") from error


def _p90(ordered: list[float]) -> float:
    """Return the smallest value that at least 90 % of the values do not exceed."""
    return ordered[-(len(ordered) // 10) - 1]


STATISTICS: Mapping[str, Callable[[list[float]], float]] = {"mean": fmean, "p90": _p90, "worst": max}
