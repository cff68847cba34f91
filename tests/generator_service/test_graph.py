"""The error graph and its file."""

import json
from pathlib import Path

import pytest

from generator_service.lemica import BadGraph, ErrorGraph, Signature

SIGNATURE = Signature("demo@1234", 4, 64, 4.0, "text-to-image", "float32", "linear", "torch 2.13.0")
GRAPH = ErrorGraph(4, {(0, 2): 0.2, (1, 4): 0.3}, SIGNATURE, {(0, 2): (0.1, 0.3), (1, 4): (0.2, 0.4)})


def test_a_graph_survives_its_file(tmp_path: Path) -> None:
    """A loaded graph equals the saved one, including signature and samples, and the file is readable JSON."""
    GRAPH.save(tmp_path / "graph.json")
    assert ErrorGraph.load(tmp_path / "graph.json") == GRAPH
    assert json.loads((tmp_path / "graph.json").read_text())["edges"][0]["samples"] == [0.1, 0.3]
    assert [file.name for file in tmp_path.iterdir()] == ["graph.json"]


def test_edges_without_skips_cost_nothing() -> None:
    """An edge that skips nothing costs 0 if it is absent; any other absent edge may not be used."""
    assert (GRAPH.error((2, 3)), GRAPH.error((0, 2)), GRAPH.error((0, 3))) == (0.0, 0.2, None)


def test_errors_are_the_mean_or_a_quantile_of_the_samples() -> None:
    """An edge's error can be the samples' mean, 90th percentile or maximum."""
    samples = {(0, 2): tuple(float(n) for n in range(1, 21))}
    graph = ErrorGraph(4, {(0, 2): 0.0}, SIGNATURE, samples)
    assert [graph.planned_for(s).errors[0, 2] for s in ("mean", "p90", "worst")] == [10.5, 18.0, 20.0]
    with pytest.raises(BadGraph, match="mean, p90, worst"):
        graph.planned_for("median")
    with pytest.raises(BadGraph, match="individual samples"):
        ErrorGraph(4, {(0, 2): 1.0}).planned_for("mean")


@pytest.mark.parametrize(
    "errors", [{(2, 2): 1.0}, {(3, 2): 1.0}, {(0, 5): 1.0}, {(-1, 2): 1.0}, {(0, 2): -1.0}, {(0, 2): float("nan")}]
)
def test_errors_that_form_no_graph_are_refused(errors: dict[tuple[int, int], float]) -> None:
    """Edges go forward inside the run, and their errors are nonnegative numbers."""
    with pytest.raises(BadGraph):
        ErrorGraph(4, errors)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": "other"}', "\x00"])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    """A file that is not a graph is an error that names the file."""
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(BadGraph, match=r"x\.json"):
        ErrorGraph.load(tmp_path / "x.json")
    with pytest.raises(BadGraph, match="absent"):
        ErrorGraph.load(tmp_path / "absent.json")
