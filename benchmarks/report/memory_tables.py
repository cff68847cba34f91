"""Tables of ``benchmarks.generator.memory`` as Markdown, for the documentation and the terminal."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from textwrap import fill
from typing import Any

from benchmarks.report.sections import markdown

Counted = Mapping[str, Any]
GPUS: Mapping[str, int] = {"24 GB": 22, "32 GB": 31, "40 GB": 39, "48 GB": 44, "80 GB": 78, "96 GB": 94, "141 GB": 138}
"""Usable GiB of GPUs by nominal memory: what PyTorch reports for the smallest GPU of each kind, rounded down."""
DEFAULT_IMAGE = "1024x1024"
GIB = 2**30
WIDTH = 120
ASSUMPTIONS = """Computed, not measured: the service's code generates images at FLUX.2 [dev]'s full size on PyTorch's
meta device, and the bytes of all live tensors are added. A test compares the result to PyTorch's allocator for a small
model on a CPU. The computation assumes attention kernels without a matrix of all pairs of tokens, compiled code that
uses no more memory than eager code, and convolutions that copy their input and output once."""


def memory_section(counted: Counted) -> Iterator[str]:
    """Yield all tables with their text."""
    yield paragraph(ASSUMPTIONS)
    yield from weights(counted)
    yield from activations(counted)
    yield from totals(counted)
    yield from gpus(counted)


def paragraph(text: str) -> str:
    """Wrap text to the width of the documentation."""
    return "\n" + fill(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False) + "\n"


def gigabytes(num_bytes: int) -> str:
    """Format bytes in units of 10^9."""
    return f"{num_bytes / 1e9:.1f} GB"


def weights(counted: Counted) -> Iterator[str]:
    """Yield the table of weights."""
    yield paragraph(
        """Weights are in bfloat16, except the 8-bit layers of `fastest`, which are loaded in bfloat16 first. The text
        encoder has 30 of its 40 layers, and under `offload` two blocks at once are on the GPU."""
    )
    where = counted["generator"]["weights"]
    columns = by_profile(counted, lambda profile: [gigabytes(size) if size else "" for size in where[profile].values()])
    rows = [(f"generator, {profiles}", *sizes) for profiles, sizes in columns]
    encoder = gigabytes(counted["encoder"]["weights"])
    rows.append(("text encoder", encoder, encoder, ""))
    yield "\n" + markdown(("weights", "on the GPU", "on the GPU while loading", "pinned in host memory"), rows)


def activations(counted: Counted) -> Iterator[str]:
    """Yield the table of the phases of a run."""
    yield paragraph(
        """Peak memory, without the weights, in each phase under `exact` and `fast`. Plain reuse keeps one cached
        feature, the largest predictor three. References are as large as the image, but at most 1024x1024. Images
        that share a run are decoded one by one."""
    )
    rows = counted["generator"]["rows"]
    in_8_bits = {row["image"]: row["step"] for row in rows if row["profile"] == "fastest"}
    lines = [
        (
            row["image"],
            *(gigabytes(row[phase]) for phase in ("references", "step", "predicted_step")),
            gigabytes(in_8_bits[row["image"]]),
            gigabytes(row["decode"]),
        )
        for row in rows
        if row["profile"] == "exact"
    ]
    header = ("image", "before the steps", "a step", "a step, three features", "a step, `fastest`", "decoding")
    yield "\n" + markdown(header, lines)
    yield paragraph(
        f"""For the decoder's attention, one head of 512 channels, only PyTorch's memory-efficient kernel needs no
        matrix of all pairs. With the fallback, decoding 2048x2048 would take
        {gigabytes(counted["math_decode"]["2048x2048"])}."""
    )


def totals(counted: Counted) -> Iterator[str]:
    """Yield the table of total memory by case and profile."""
    cache, allowance = gigabytes(counted["reference_cache"]), gigabytes(counted["allowance"])
    yield paragraph(
        f"""The generator needs its weights, the largest phase, {cache} for the cache of reference images, and an
        allowance of {allowance} for the CUDA context, workspaces of libraries and rounding by the allocator. LoRA
        adapters are not included."""
    )
    columns = by_profile(counted, lambda profile: [gigabytes(total) for total in running(counted, profile).values()])
    images = [row["image"] for row in counted["generator"]["rows"] if row["profile"] == "exact"]
    header = ("image", *(profiles for profiles, _ in columns))
    yield "\n" + markdown(header, list(zip(images, *(totals for _, totals in columns), strict=True)))


def gpus(counted: Counted) -> Iterator[str]:
    """Yield the table of what fits on each GPU, including loading."""
    usable_memory = ", ".join(f"{gib} GiB of {gpu}" for gpu, gib in GPUS.items())
    batches = {f"batches of {row['batch']}": row["total"] for row in counted["encoder"]["batches"]}
    largest, encoder_bytes = list(batches.items())[-1]
    started = gigabytes(running(counted, "fastest")[DEFAULT_IMAGE] + encoder_bytes)
    yield paragraph(
        f"""What fits on one GPU from loading to decoding: "all" rows of the table above, its largest row that fits,
        or "no" row. "Both" includes a text encoder with {largest}. With `fastest`, loading determines the memory; after
        the start both need {started} at {DEFAULT_IMAGE}. The usable memory is {usable_memory}."""
    )
    alone = by_profile(counted, lambda profile: verdicts(needs(counted, profile)))
    both = by_profile(
        counted,
        lambda profile: verdicts({image: n + encoder_bytes for image, n in needs(counted, profile).items()}),
    )
    rows = [(f"generator, {profiles}", *cells) for profiles, cells in alone]
    rows.append(("text encoder", *verdicts(batches)))
    rows += [(f"both, {profiles}", *cells) for profiles, cells in both]
    yield "\n" + markdown(("on one GPU", *GPUS), rows)


def by_profile(counted: Counted, cells_of: Callable[[str], Iterable[str]]) -> list[tuple[str, tuple[str, ...]]]:
    """Return the names of profiles with their cells; profiles with equal cells share a row."""
    names: dict[tuple[str, ...], list[str]] = {}
    for profile in counted["generator"]["weights"]:
        names.setdefault(tuple(cells_of(profile)), []).append(f"`{profile}`")
    return [(", ".join(profiles), cells) for cells, profiles in names.items()]


def running(counted: Counted, profile: str) -> dict[str, int]:
    """Return the bytes of the running generator for each case."""
    return {row["image"]: row["total"] for row in counted["generator"]["rows"] if row["profile"] == profile}


def needs(counted: Counted, profile: str) -> dict[str, int]:
    """Return the bytes of the generator for each case, including loading."""
    loading = counted["generator"]["weights"][profile]["loading"] + counted["allowance"]
    return {image: max(total, loading) for image, total in running(counted, profile).items()}


def verdicts(needed: Mapping[str, int]) -> Iterator[str]:
    """Yield for each GPU what fits: ``all``, the largest case, or ``no``."""
    for gpu in GPUS:
        names = fitting(needed, gpu)
        yield "all" if len(names) == len(needed) else max(names, key=lambda name: needed[name], default="no")


def fitting(needed: Mapping[str, int], gpu: str) -> list[str]:
    """Return the names of the cases that fit on a GPU."""
    return [name for name, num_bytes in needed.items() if num_bytes <= GPUS[gpu] * GIB]
