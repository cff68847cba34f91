"""What each benchmark's result says, as Markdown: for ``benchmarks.report``."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Report = Mapping[str, Any]
PICTURES = ("profile", "picture", "mode", "computed", "seconds", "floor", "of the floor", "energy", "power, clock")
STEPS = (
    "profile",
    "image",
    "a computed step",
    "floor",
    "of the floor",
    "a reused step",
    "decoding",
    "rest",
    "memory",
)
LEFT_OUT = ("profile", "image", "mode", "why", "estimated from per-step")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    first, *rest = ("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |\n" for line in (header, *rows))
    return "".join([first, "|", "---|" * len(header), "\n", *rest])


def spread(value: Mapping[str, float], *, in_ms: bool = False) -> str:
    """A median, and the range if there is one."""
    scale, digits, unit = (1000, 2, "ms") if in_ms else (1, 2, "s")
    median = f"{scale * value['median']:.{digits}f} {unit}"
    if value["count"] == 1:
        return median
    return f"{median} ({scale * value['min']:.{digits}f} to {scale * value['max']:.{digits}f}; {value['count']})"


def of_floor(floor_s: float | None, taken_s: float) -> tuple[str, str]:
    """The floor, and the share of its speed that was reached."""
    return ("", "") if floor_s is None else (f"{floor_s:.2f} s", f"{100 * floor_s / taken_s:.0f} %")


def latency(report: Report) -> Iterator[str]:
    """Pictures, steps, and what was left out."""
    done = (f"- asked for `{profile}`: {performance}\n" for profile, performance in report["performance"].items())
    yield f"\nIn {report['dtype'].removeprefix('torch.')}, but for what a profile changes:\n\n" + "".join(done)
    if report["pictures"]:
        yield "\nWhole pictures, end to end; the floor is of their computed steps alone.\n\n"
        header = (
            "profile",
            "image",
            "mode",
            "computed",
            "seconds",
            "floor",
            "of the floor",
            "energy",
            "power, clock",
        )
        yield markdown(header, [picture_row(row) for row in report["pictures"]])
    if report["steps"]:
        yield "\nWhat steps cost, from runs of different length, and what a picture takes beside them.\n\n"
        yield markdown(STEPS, [steps_row(row) for row in report["steps"]])
    if report["left_out"]:
        yield "\nNot measured in this run; estimates are from the cost of steps above.\n\n"
        yield markdown(LEFT_OUT, [left_out_row(row) for row in report["left_out"]])


def picture_row(row: Report) -> tuple[str, ...]:
    """Of one mode."""
    drawn = row["drawn"]
    energy, power = "", ""
    if drawn is not None:
        energy = f"{drawn['energy_j'] / row['seconds']['count']:.0f} J"
        power = f"{drawn['mean_w']:.0f} W, {drawn['mean_sm_mhz']:.0f} MHz"
    steps = f"{row['num_computed']} of {row['num_steps']}"
    floor = of_floor(row["floor_s"], row["seconds"]["median"])
    return (row["profile"], row["shape"], row["mode"], steps, spread(row["seconds"]), *floor, energy, power)


def steps_row(row: Report) -> tuple[str, ...]:
    """Of one shape."""
    return (
        row["profile"],
        row["shape"],
        spread(row["computed_s"], in_ms=True),
        *of_floor(row["floor_s"], row["computed_s"]["median"]),
        spread(row["reused_s"], in_ms=True),
        spread(row["decode_s"], in_ms=True),
        f"{1000 * row['fixed_s']:.0f} ms",
        "" if row["peak_memory_gb"] is None else f"{row['peak_memory_gb']:.1f} GB",
    )


def left_out_row(row: Report) -> tuple[str, ...]:
    """What was left out."""
    estimate_s = row.get("estimated_from_steps_s")
    estimate = "" if estimate_s is None else f"{estimate_s:.2f} s"
    return (row["profile"], row.get("shape", "all"), row.get("mode", "all"), row["reason"], estimate)


def peers(report: Report) -> Iterator[str]:
    """Ratios, and seconds where there are any."""
    yield (
        f"\nOne run, the same weights and embedding, {report['side']}x{report['side']}, {report['num_steps']} steps,"
        " from the"
        "\nembedding to the picture. Ratios of times, above 1 is faster; ours computed as many steps as the other."
    )
    has_seconds = any("seconds" in row for row in report["rows"])
    yield "\n\n" if has_seconds else " Times\nare of the processor.\n\n"
    rows = []
    for row in report["rows"]:
        ratio = row["speedup_over_diffusers"]
        ours = ", ".join(f"{name} {value:.2f}" for name, value in row.get("ours_is_faster_by", {}).items())
        seconds = [spread(row["seconds"])] if has_seconds else []
        rows.append([row["way"], str(row["num_computed"]), *seconds, f"{ratio:.2f}" if ratio else "", ours])
    header = ["way", "computed steps", *(["seconds"] if has_seconds else []), "over diffusers", "ours over it"]
    yield markdown(header, rows)
    yield from left_out_lines(report["left_out"])


def left_out_lines(lines: Sequence[str]) -> Iterator[str]:
    """What a run could not do."""
    if lines:
        yield "\nLeft out:\n\n" + "".join(f"- {line}\n" for line in lines)


def trace(report: Report) -> Iterator[str]:
    """Waits, and the longest kernels."""
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
    """What a reused step costs."""
    rows = [
        ("a computed step", spread(report["computed_s"], in_ms=True)),
        ("a reused step", spread(report["reused_s"], in_ms=True)),
        ("a reused step over a computed one", f"{100 * report['reused_over_computed']:.2f} %"),
        ("`exact` equals diffusers bit for bit", "yes" if report["exact_equals_diffusers"] else "no"),
    ]
    if "compilations_after_warm_up" in report:
        rows.append(("graphs that `fast` compiled after it was warm", str(report["compilations_after_warm_up"])))
    yield f"\n{report['side']}x{report['side']}, schedule {report['mode']}; a step with the scheduler's part.\n\n"
    yield markdown(("figure", "value"), rows)


def load(report: Report) -> Iterator[str]:
    """What many clients saw; times only of a GPU."""
    size = f"{report['width']}x{report['height']}, {report['num_inference_steps']} steps, cache {report['cache']}"
    shared = f", {report['batch']} of which may share a run" if report["batch"] > 1 else ""
    yield (
        f"\n{report['clients']} clients over HTTP for {report['seconds']:.0f} s, each with a picture after the other"
        f"{shared}: {size}.\nThey and a bare loop over diffusers' pipeline took turns.\n\n"
    )
    rows = [
        *((f"OpenMP of `{module}`", openmp(found)) for module, found in report.get("openmp", {}).items()),
        ("answers", ", ".join(f"{count} x {status}" for status, count in report["statuses"].items())),
        ("pictures a second over those of the bare loop: the median turn's", f"{report['ratio']:.3f}"),
        ("each turn's", ", ".join(f"{ratio:.3f}" for ratio in report["ratios"])),
        (
            "an answer's estimate is off by: median, 90 %",
            percents(report, "estimate_error_median", "estimate_error_p90"),
        ),
        ("memory of the generator, half way and at the end", "{} MB, {} MB".format(*report["memory_mb_half_and_end"])),
    ]
    if report["device_idle_share"] is not None:
        rows.append(("share of the time in which nothing is drawn", percents(report, "device_idle_share")))
    if "gpu" in report["card"]["machine"]:
        seconds = ", ".join(f"{value:.2f} s" for value in report["latency_s"].values())
        rows += [
            ("pictures a second", f"{report['pictures_per_s']:.2f}"),
            ("a picture, refusals before it included: median, 95 %, 99 %", seconds),
        ]
    yield markdown(("figure", "value"), rows)


def overhead(report: Report) -> Iterator[str]:
    """The service beside the bare pipeline, for one client; ratios alone."""
    yield (
        "\nOne client over HTTP, in turns with diffusers' pipeline in a process with OpenMP's defaults:"
        f" {report['steps']} steps,\nevery one computed. The ratio is of the median times. OpenMP's settings of both"
        " services are beside it.\n\n"
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
    """Threads and how they wait."""
    return f"threads {report['threads']}, wait policy {report['wait_policy']}, spin count {report['spin_count']}"


def percents(report: Report, *names: str) -> str:
    """Shares."""
    return ", ".join(f"{100 * report[name]:.1f} %" for name in names)


def precision(report: Report) -> Iterator[str]:
    """What computing with fewer bits does to pictures."""
    size = f"{report['side']}x{report['side']}, {report['steps']} steps, every one computed"
    yield (
        f"\n{report['prompts']} held-out prompts, {size}. A step's error is the mean of `|a - b| / |b|` of its velocity"
        " on\nthe same latents; pictures have 8 bits a channel; right is the share that shows what its prompt says.\n\n"
    )
    header = ("computed in", "step to float32", "to bfloat16", "image to float32", "to bfloat16", "worst", "right")
    rows = []
    for row in report["rows"]:
        steps = (f"{100 * row[f'step_error_to_{other}']:.2f} %" for other in ("float32", "bfloat16"))
        decibels = (row[name] for name in ("psnr_to_float32", "psnr_to_bfloat16", "worst_psnr_to_bfloat16"))
        pictures = ("equal" if value is None else f"{value:.1f} dB" for value in decibels)
        rows.append((row["name"], *steps, *pictures, f"{100 * row['right']:.1f} %"))
    yield markdown(header, rows)


def encoder(report: Report) -> Iterator[str]:
    """Prompts in the text encoder."""
    rows = [
        (
            row["profile"],
            row["weights"],
            str(row["batch"]),
            str(row["prompt_tokens"]),
            spread(row["seconds"], in_ms=True),
            f"{row['prompts_per_s']:.1f}",
            f"{row['peak_gb']:.1f} GB" if "peak_gb" in row else "",
        )
        for row in report["rows"]
    ]
    yield "\nFrom token ids to embeddings in host memory. Of short prompts `fast` computes a quarter of the length.\n\n"
    yield markdown(("profile", "weights", "batch", "tokens of each prompt", "a batch", "prompts/s", "memory"), rows)
    off = [(what, f"{value:.2g}", "") for what, value in report["difference"].items()]
    compiled = [(what, "", f"{value:.0f} s") for what, value in report["compile_s"].items()]
    yield "\nHow far a token's hidden states lie from the library's at most, relative to their norm, and compiling.\n\n"
    yield markdown(("weights, what is done", "difference", "compiling for two lengths"), [*off, *compiled])
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
