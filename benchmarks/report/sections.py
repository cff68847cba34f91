"""Sections of ``benchmarks.report`` for each benchmark, as Markdown."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Report = Mapping[str, Any]
IMAGES = ("profile", "image", "mode", "computed", "seconds", "roofline", "of the roofline", "energy", "power, clock")
STEPS = (
    "profile",
    "image",
    "a computed step",
    "roofline",
    "of the roofline",
    "a reused step",
    "decoding",
    "rest",
    "memory",
)
LEFT_OUT = ("profile", "image", "mode", "why", "estimated from per-step")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table."""
    first, *rest = ("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |\n" for line in (header, *rows))
    return "".join([first, "|", "---|" * len(header), "\n", *rest])


def median_and_range(value: Mapping[str, float], *, in_ms: bool = False) -> str:
    """Format the median and, for several measurements, the range and the count."""
    scale, digits, unit = (1000, 2, "ms") if in_ms else (1, 2, "s")
    median = f"{scale * value['median']:.{digits}f} {unit}"
    if value["count"] == 1:
        return median
    return f"{median} ({scale * value['min']:.{digits}f} to {scale * value['max']:.{digits}f}; {value['count']})"


def roofline_cells(roofline_s: float | None, measured_s: float) -> tuple[str, str]:
    """Format the roofline and the achieved share of it."""
    return ("", "") if roofline_s is None else (f"{roofline_s:.2f} s", f"{100 * roofline_s / measured_s:.0f} %")


def latency(report: Report) -> Iterator[str]:
    """Yield the tables of ``benchmarks.generator.latency``."""
    done = (f"- requested `{profile}`: {performance}\n" for profile, performance in report["performance"].items())
    yield f"\nIn {report['dtype'].removeprefix('torch.')}, except for changes by profiles:\n\n" + "".join(done)
    if report["pictures"]:
        yield "\nWhole images, end to end; the roofline includes only their computed steps.\n\n"
        yield markdown(IMAGES, [image_row(row) for row in report["pictures"]])
    if report["steps"]:
        yield "\nTimes of steps, from runs of different lengths, and remaining times of an image.\n\n"
        yield markdown(STEPS, [steps_row(row) for row in report["steps"]])
    if report["left_out"]:
        yield "\nNot measured in this run; estimates are based on the times of steps above.\n\n"
        yield markdown(LEFT_OUT, [left_out_row(row) for row in report["left_out"]])


def image_row(row: Report) -> tuple[str, ...]:
    """Format the times of whole images in one mode."""
    usage = row["drawn"]
    energy, power = "", ""
    if usage is not None:
        energy = f"{usage['energy_j'] / row['seconds']['count']:.0f} J"
        power = f"{usage['mean_w']:.0f} W, {usage['mean_sm_mhz']:.0f} MHz"
    steps = f"{row['num_computed']} of {row['num_steps']}"
    roofline = roofline_cells(row["floor_s"], row["seconds"]["median"])
    return (
        row["profile"],
        row["shape"],
        row["mode"],
        steps,
        median_and_range(row["seconds"]),
        *roofline,
        energy,
        power,
    )


def steps_row(row: Report) -> tuple[str, ...]:
    """Format the times of steps of one shape."""
    return (
        row["profile"],
        row["shape"],
        median_and_range(row["computed_s"], in_ms=True),
        *roofline_cells(row["floor_s"], row["computed_s"]["median"]),
        median_and_range(row["reused_s"], in_ms=True),
        median_and_range(row["decode_s"], in_ms=True),
        f"{1000 * row['fixed_s']:.0f} ms",
        "" if row["peak_memory_gb"] is None else f"{row['peak_memory_gb']:.1f} GB",
    )


def left_out_row(row: Report) -> tuple[str, ...]:
    """Format an omitted measurement."""
    estimate_s = row.get("estimated_from_steps_s")
    estimate = "" if estimate_s is None else f"{estimate_s:.2f} s"
    return (row["profile"], row.get("shape", "all"), row.get("mode", "all"), row["reason"], estimate)


def peers(report: Report) -> Iterator[str]:
    """Yield the table of ``benchmarks.lemica.peers``."""
    yield (
        f"\nOne run, the same weights and embedding, {report['side']}x{report['side']}, {report['num_steps']} steps,"
        " from the"
        "\nembedding to the image. Ratios of times: above 1 is faster, at equal numbers of computed steps."
    )
    has_seconds = any("seconds" in row for row in report["rows"])
    yield "\n\n" if has_seconds else " They are\nof CPU time.\n\n"
    rows = []
    for row in report["rows"]:
        ratio = row["speedup_over_diffusers"]
        ours = ", ".join(f"{name} {value:.2f}" for name, value in row.get("ours_is_faster_by", {}).items())
        seconds = [median_and_range(row["seconds"])] if has_seconds else []
        rows.append([row["way"], str(row["num_computed"]), *seconds, f"{ratio:.2f}" if ratio else "", ours])
    header = ["method", "computed steps", *(["seconds"] if has_seconds else []), "over diffusers", "ours over it"]
    yield markdown(header, rows)
    yield from left_out_lines(report["left_out"])


def left_out_lines(lines: Sequence[str]) -> Iterator[str]:
    """Yield a list of omitted measurements."""
    if lines:
        yield "\nLeft out:\n\n" + "".join(f"- {line}\n" for line in lines)


def trace(report: Report) -> Iterator[str]:
    """Yield the waits and the longest kernels of ``benchmarks.generator.trace``."""
    waits = ", ".join(f"{count} x {name}" for name, count in report["waits"].items()) or "none"
    yield f"\n{report['performance']}. Waits for the device inside a loop of {report['num_steps']} steps: {waits}.\n"
    for step in report["steps"]:
        kind = "computed" if step["is_computed"] else "reused"
        yield (
            f"\nA {kind} step, {report['side']}x{report['side']}: {step['wall_ms']:.2f} ms, of which the device is busy"
            f" for {step['busy_ms']:.2f} ms\nwith {step['num_kernels']} kernels. The longest:\n\n"
        )
        rows = [(f"`{name[:80]}`", str(count), f"{ms:.3f}") for name, count, ms in step["top"][:8]]
        yield markdown(("kernel", "runs", "ms"), rows)


def reuse(report: Report) -> Iterator[str]:
    """Yield the table of ``benchmarks.lemica.reuse``."""
    rows = [
        ("a computed step", median_and_range(report["computed_s"], in_ms=True)),
        ("a reused step", median_and_range(report["reused_s"], in_ms=True)),
        ("a reused step over a computed one", f"{100 * report['reused_over_computed']:.2f} %"),
        ("`exact` equals diffusers bit for bit", "yes" if report["exact_equals_diffusers"] else "no"),
    ]
    if "compilations_after_warm_up" in report:
        rows.append(("graphs that `fast` compiled after the warm-up", str(report["compilations_after_warm_up"])))
    yield f"\n{report['side']}x{report['side']}, schedule {report['mode']}; a step includes the scheduler.\n\n"
    yield markdown(("figure", "value"), rows)


def load(report: Report) -> Iterator[str]:
    """Yield the table of ``benchmarks.serving.load``; times only for a GPU."""
    size = f"{report['width']}x{report['height']}, {report['num_inference_steps']} steps, cache {report['cache']}"
    shared = f", of which {report['batch']} may share a run" if report["batch"] > 1 else ""
    yield (
        f"\n{report['clients']} clients over HTTP for {report['seconds']:.0f} s, each with one image after the other"
        f"{shared}: {size}.\nThe clients alternated with a loop over diffusers' pipeline.\n\n"
    )
    rows = [
        *((f"OpenMP of `{module}`", openmp(settings)) for module, settings in report.get("openmp", {}).items()),
        ("responses", ", ".join(f"{count} x {status}" for status, count in report["statuses"].items())),
        ("images per second relative to the loop: median of the turns", f"{report['ratio']:.3f}"),
        ("each turn", ", ".join(f"{ratio:.3f}" for ratio in report["ratios"])),
        (
            "error of the estimates: median, 90th percentile",
            percents(report, "estimate_error_median", "estimate_error_p90"),
        ),
        (
            "memory of the generator, halfway and at the end",
            "{} MB, {} MB".format(*report["memory_mb_half_and_end"]),
        ),
    ]
    if report["device_idle_share"] is not None:
        rows.append(("share of the time in which the device is idle", percents(report, "device_idle_share")))
    if "gpu" in report["card"]["machine"]:
        seconds = ", ".join(f"{value:.2f} s" for value in report["latency_s"].values())
        rows += [
            ("images per second", f"{report['pictures_per_s']:.2f}"),
            ("latency of an image including earlier 429 responses: median, 95 %, 99 %", seconds),
        ]
    yield markdown(("figure", "value"), rows)


def overhead(report: Report) -> Iterator[str]:
    """Yield the table of ``benchmarks.serving.overhead``; only ratios."""
    yield (
        "\nOne client over HTTP alternates with diffusers' pipeline in a process with OpenMP's defaults:"
        f" {report['steps']} steps,\nall computed. The ratio is that of the median times, under the given OpenMP"
        " settings of both services.\n\n"
    )
    header = ("settings", "text encoder", "generator", "size", "service over pipeline", "CPU time of other programs")
    rows = [
        (
            row["settings"],
            *(openmp(row["openmp"][module]) for module in ("text_encoder_service", "generator_service")),
            f"{row['side']}x{row['side']}",
            f"{row['ratio']:.2f}",
            percents(row, "others_share"),
        )
        for row in report["rows"]
    ]
    yield markdown(header, rows)


def openmp(report: Report) -> str:
    """Format OpenMP settings."""
    return f"threads {report['threads']}, wait policy {report['wait_policy']}, spin count {report['spin_count']}"


def percents(report: Report, *names: str) -> str:
    """Format shares as percentages."""
    return ", ".join(f"{100 * report[name]:.1f} %" for name in names)


def precision(report: Report) -> Iterator[str]:
    """Yield the table of ``benchmarks.generator.precision``."""
    size = f"{report['side']}x{report['side']}, {report['steps']} steps, all computed"
    yield (
        f"\n{report['prompts']} held-out prompts, {size}. A step's error is the mean of `|a - b| / |b|` of its velocity"
        " on\nthe same latents. Images have 8 bits per channel; `right` is the share that follows its prompt.\n\n"
    )
    header = ("computed in", "step to float32", "to bfloat16", "image to float32", "to bfloat16", "worst", "right")
    rows = []
    for row in report["rows"]:
        steps = (f"{100 * row[f'step_error_to_{other}']:.2f} %" for other in ("float32", "bfloat16"))
        decibels = (row[name] for name in ("psnr_to_float32", "psnr_to_bfloat16", "worst_psnr_to_bfloat16"))
        images = ("equal" if value is None else f"{value:.1f} dB" for value in decibels)
        rows.append((row["name"], *steps, *images, f"{100 * row['right']:.1f} %"))
    yield markdown(header, rows)


def encoder(report: Report) -> Iterator[str]:
    """Yield the tables of ``benchmarks.encoder.latency``."""
    rows = [
        (
            row["profile"],
            row["weights"],
            str(row["batch"]),
            str(row["prompt_tokens"]),
            median_and_range(row["seconds"], in_ms=True),
            f"{row['prompts_per_s']:.1f}",
            f"{row['peak_gb']:.1f} GB" if "peak_gb" in row else "",
        )
        for row in report["rows"]
    ]
    yield "\nFrom token ids to embeddings in host memory. Of short prompts, `fast` computes a quarter of the row.\n\n"
    yield markdown(("profile", "weights", "batch", "tokens of each prompt", "a batch", "prompts/s", "memory"), rows)
    differences = [(what, f"{value:.2g}", "") for what, value in report["difference"].items()]
    compiled = [(what, "", f"{value:.0f} s") for what, value in report["compile_s"].items()]
    yield "\nLargest relative difference of a token's hidden states from those of transformers, and compile times.\n\n"
    yield markdown(("weights, optimization", "difference", "compile time for two lengths"), [*differences, *compiled])
    yield f"\nGraphs compiled after that: {report['compilations_after_warm_up']}.\n"
    yield "".join(f"\n- left out: {line}\n" for line in report["left_out"])


SECTIONS: Mapping[str, Callable[[Report], Iterator[str]]] = {
    "latency": latency,
    "peers": peers,
    "trace": trace,
    "precision": precision,
    "reuse": reuse,
    "encoder": encoder,
    "load": load,
    "overhead": overhead,
}
