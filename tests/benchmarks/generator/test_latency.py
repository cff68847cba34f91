"""The benchmark of an image's duration."""

from dataclasses import replace

import pytest

from benchmarks.architectures import TINY
from benchmarks.generator.engine import Shape, noise_reference, open_bench
from benchmarks.generator.latency import arguments, measure
from benchmarks.generator.profile_run import Report, Steps
from benchmarks.generator.synthetic import Source
from benchmarks.report.stopwatch import Summary
from flux2_shared.model.compilation import CompilationFailed
from generator_service.lemica import schedule_for
from generator_service.pipelines.optimizations.compiled_model import CompiledModel

SOURCE = Source(TINY, device="cpu")


@pytest.mark.parametrize(
    ("shape", "num_tokens", "name"),
    [
        (Shape(512), 1024, "512x512"),
        (Shape(1024, 1), 8192, "1024x1024 + 1 reference"),
        (Shape(2048, 4), 16384 + 4 * 4096, "2048x2048 + 4 references"),
    ],
)
def test_tokens_of_a_shape(shape: Shape, num_tokens: int, name: str) -> None:
    """An image has a token for 16 x 16 pixels, and a reference image, at most 1024x1024, as many of its own."""
    assert shape.num_image_tokens(16) == num_tokens
    assert str(shape) == name
    sizes = {noise_reference(shape, seed).sha256 for seed in range(3)}
    assert len(sizes) == 3, "each is new to the model's cache"


def test_an_image_ends_as_a_png_file() -> None:
    """The time is of the whole way to the file, and holds denoising and decoding."""
    with SOURCE.model("exact") as model, open_bench(model, SOURCE.embedding()) as bench:
        bench.warm_up(Shape(64, 1))
        taken = bench.generate(Shape(64, 1), schedule_for(2, 4), seed=1)
    assert taken.denoise_s > 0
    assert taken.decode_s > 0
    assert taken.rest_s >= 0


def test_shapes_that_do_not_fit_are_reported() -> None:
    """Without time no image is generated, and every shape is listed as skipped."""
    args = arguments().parse_args(["--smoke", "--budget-s", "0", "--profiles", "exact"])
    report = measure(SOURCE, args)
    assert report.steps == []
    assert report.pictures == []
    assert [entry["shape"] for entry in report.left_out] == ["128x128", "64x64 + 1 reference"]


def test_shapes_are_skipped_by_measurements_of_earlier_profiles() -> None:
    """A profile's first shape is skipped, too, if it would not fit according to another profile's measurements."""
    command = ["--smoke", "--profiles", "exact", "fast", "--sides", "64", "--repeats", "1", "--modes", "none"]

    def slow_down(report: Report) -> None:
        report.steps[:] = [replace(row, prepare_s=1000.0) for row in report.steps]

    report = measure(SOURCE, arguments().parse_args([*command, "--steps", "2"]), slow_down)
    assert [row.profile for row in report.steps] == ["exact"]
    assert report.left_out[-1]["profile"] == "fast"
    assert "it would have taken about 1000 s" in report.left_out[-1]["reason"]


def test_results_are_reported_immediately() -> None:
    """After each shape's steps and each image the report is updated."""
    command = ["--smoke", "--profiles", "exact", "--sides", "64", "--repeats", "1", "--modes", "none", "2"]
    seen: list[tuple[int, int]] = []
    measure(
        SOURCE,
        arguments().parse_args([*command, "--steps", "4"]),
        lambda report: seen.append((len(report.steps), len(report.pictures))),
    )
    assert seen == [(1, 0), (1, 1), (1, 2)]


def test_a_profile_that_could_not_be_compiled_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the compiler fails, the profile is skipped with the reason, since its results are not for uncompiled code."""

    def fail(*_: object) -> None:
        raise CompilationFailed

    monkeypatch.setattr(CompiledModel, "compiling", fail)
    report = measure(SOURCE, arguments().parse_args(["--smoke", "--profiles", "fast", "--sides", "64"]))
    assert report.steps == []
    assert report.pictures == []
    assert "compile is left out" in report.left_out[0]["reason"]
    assert "compile is left out" in report.performance["fast"]


def test_an_image_is_estimated_from_its_steps() -> None:
    """An estimate is the sum of computed steps, reused steps, decoding, and the rest."""
    computed_s, reused_s, decode_s = (Summary.of([seconds]) for seconds in (2.0, 0.5, 3.0))
    steps = Steps("exact", "64x64", 16, 0.0, computed_s, reused_s, 4.0, decode_s, None, None)
    assert steps.estimate_s(schedule_for(2, 5)) == 2 * 2.0 + 3 * 0.5 + 3.0 + 4.0


def test_images_that_do_not_fit_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that is estimated to end too late is skipped and listed with the estimate."""
    monkeypatch.setattr(Steps, "estimate_s", lambda _steps, _schedule: 1000.0)
    command = ["--smoke", "--profiles", "exact", "--sides", "64", "--repeats", "1", "--steps", "2"]
    report = measure(SOURCE, arguments().parse_args([*command, "--budget-s", "900", "--modes", "none"]))
    assert [row.shape for row in report.steps] == ["64x64"]
    assert report.pictures == []
    assert report.left_out[0]["estimated_from_steps_s"] == 1000.0
