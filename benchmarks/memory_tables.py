"""What ``benchmarks.memory`` counted, as Markdown: for the page of figures, and for people at a terminal."""

from collections.abc import Iterator, Mapping
from textwrap import fill
from typing import Any

from benchmarks.report_tables import markdown

Counted = Mapping[str, Any]
CARDS: Mapping[str, int] = {"24 GB": 22, "32 GB": 31, "40 GB": 39, "48 GB": 44, "80 GB": 78, "96 GB": 94, "141 GB": 138}
"""How many GiB of each card are taken to be usable: what PyTorch reports for the smallest of its kind, rounded down."""
COMMON_CARDS = ("80 GB", "141 GB")
DEFAULT_IMAGE = "1024x1024"
GIB = 2**30
WIDTH = 120
ASSUMPTIONS = """Counted, not measured: the service's own code generates images at FLUX.2 [dev]'s full size on PyTorch's
meta device, where tensors have sizes and no memory, and the bytes of all tensors that are alive at once are added up. A
test compares the count with what PyTorch's allocator gives out for a small model on a CPU. Taken for granted are:
attention kernels that never hold the matrix of all pairs of tokens; compiled code that holds no more than uncompiled
code; and convolutions that copy their input and their output once."""


def memory_section(counted: Counted) -> Iterator[str]:
    """All tables."""
    yield paragraph(ASSUMPTIONS)
    yield from weights(counted)
    yield from activations(counted)
    yield from totals(counted)
    yield from cards(counted)


def paragraph(text: str) -> str:
    """Wrapped as the pages are."""
    return "\n" + fill(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False) + "\n"


def gigabytes(num_bytes: int) -> str:
    """In units of 10^9 bytes."""
    return f"{num_bytes / 1e9:.1f} GB"


def weights(counted: Counted) -> Iterator[str]:
    """Where the weights are."""
    yield paragraph(
        """Weights: transformer and VAE in bfloat16, but for the 8-bit layers of `fastest`, which are loaded in bfloat16
        first; 30 of the text encoder's 40 layers. Under `offload` two blocks at once are on the GPU."""
    )
    rows = [
        (f"generator, `{profile}`", *(gigabytes(where[name]) if where[name] else "" for name in where))
        for profile, where in counted["generator"]["weights"].items()
    ]
    encoder = gigabytes(counted["encoder"]["weights"])
    rows.append(("text encoder", encoder, encoder, ""))
    yield "\n" + markdown(("weights", "on the GPU", "on the GPU while loading", "pinned in host memory"), rows)


def activations(counted: Counted) -> Iterator[str]:
    """The phases of a run."""
    yield paragraph(
        """The most that is alive beside the weights in each phase of a run under `exact`; `fast` takes the same. Plain
        reuse keeps one cached feature, the largest predictor three. References are as large as the image, but at most
        1024x1024. Images that share a run are decoded one after the other."""
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
        f"""The decoder's attention has one head of 512 channels, for which of PyTorch's kernels only the
        memory-efficient one needs no matrix of all pairs. By PyTorch's fallback, decoding 2048x2048 would take
        {gigabytes(counted["math_decode"]["2048x2048"])}."""
    )


def totals(counted: Counted) -> Iterator[str]:
    """What each case needs under each profile, and where it fits."""
    cache, allowance = gigabytes(counted["reference_cache"]), gigabytes(counted["allowance"])
    yield paragraph(
        f"""What the generator needs in all: its weights, the phase that takes most, {cache} for the cache of reference
        images, and an allowance of {allowance} for the CUDA context, the libraries' workspaces and the allocator's
        rounding. LoRA adapters come on top. The last columns name the profiles that fit, from loading on."""
    )
    profiles = list(counted["generator"]["weights"])
    rows = []
    for image in needs(counted, profiles[0]):
        shown = (gigabytes(running(counted, profile)[image]) for profile in profiles)
        needed = {profile: needs(counted, profile)[image] for profile in profiles}
        fits = (fitting(needed, card) for card in COMMON_CARDS)
        rows.append((image, *shown, *(", ".join(names) if names != profiles else "all" for names in fits)))
    header = ("image", *(f"`{profile}`" for profile in profiles), *(f"fit {card}" for card in COMMON_CARDS))
    yield "\n" + markdown(header, rows)


def cards(counted: Counted) -> Iterator[str]:
    """What each card holds, loading included."""
    usable_memory = ", ".join(f"{gib} GiB of {card}" for card, gib in CARDS.items())
    batches = {f"batches of {row['batch']}": row["total"] for row in counted["encoder"]["batches"]}
    largest, encoder_bytes = list(batches.items())[-1]
    started = gigabytes(running(counted, "fastest")[DEFAULT_IMAGE] + encoder_bytes)
    yield paragraph(
        f"""What one GPU holds, from loading to decoding: everything in the table above ("all"), or the largest part of
        it, or nothing ("no"). "Both" is with a text encoder that encodes {largest}. For both with `fastest` loading
        decides: once started, they need {started} at {DEFAULT_IMAGE}. Taken to be usable are {usable_memory}."""
    )
    profiles = list(counted["generator"]["weights"])
    rows = [(f"generator, `{profile}`", *verdicts(needs(counted, profile))) for profile in profiles]
    rows.append(("text encoder", *verdicts(batches)))
    for profile in profiles:
        both = {image: total + encoder_bytes for image, total in needs(counted, profile).items()}
        rows.append((f"both, `{profile}`", *verdicts(both)))
    yield "\n" + markdown(("on one GPU", *CARDS), rows)


def running(counted: Counted, profile: str) -> dict[str, int]:
    """The bytes that the generator needs for each case once it has started."""
    return {row["image"]: row["total"] for row in counted["generator"]["rows"] if row["profile"] == profile}


def needs(counted: Counted, profile: str) -> dict[str, int]:
    """The bytes that the generator needs for each case, loading included."""
    loading = counted["generator"]["weights"][profile]["loading"] + counted["allowance"]
    return {image: max(total, loading) for image, total in running(counted, profile).items()}


def verdicts(needed: Mapping[str, int]) -> Iterator[str]:
    """For each card what of it fits."""
    for card in CARDS:
        names = fitting(needed, card)
        yield "all" if len(names) == len(needed) else max(names, key=lambda name: needed[name], default="no")


def fitting(needed: Mapping[str, int], card: str) -> list[str]:
    """The names of those that fit a card."""
    return [name for name, num_bytes in needed.items() if num_bytes <= CARDS[card] * GIB]
