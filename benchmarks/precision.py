"""What computing with fewer bits does to pictures of the demo model: ``python -m benchmarks.precision``.

Held-out prompts with every step computed, by the product's own profiles: float32 and bfloat16 as they are, and
bfloat16 with the blocks' linear layers in 8 bits (torchao, the extra ``quantization``; left out where it is not
installed). Each is measured against float32 and against bfloat16: one step on the same latents, and whole pictures of
8 bits a channel. torchao's own check wants a GPU of compute capability 8.9; a CPU has the same products, slowly, so
the check is told to pass. Prints a card and, last, one JSON line.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec

import numpy as np
import torch
from PIL.Image import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.card import machine_card
from benchmarks.quality import GUIDANCE, Case, Studio
from demo_model.checker import mistakes, read_image
from demo_model.services import WEIGHTS
from flux2_shared.model.folder import ModelFolder
from generator_service.engine.quality import pixels, psnr
from generator_service.lemica import schedule_for
from generator_service.pipelines.flux2 import Flux2Model, to_pil
from generator_service.pipelines.optimizations.profiles import EXACT, Performance
from generator_service.pipelines.params import Params

FP8 = Performance("fastest", frozenset({"fp8", "fused_qkv"}))
SIGMA = 0.5
"""Of the one step."""


@dataclass(frozen=True)
class Row:
    """One way of computing, against two others."""

    name: str
    step_error_to_float32: float
    """Relative error of the velocity, in the L2 norm, on the same latents."""
    step_error_to_bfloat16: float
    psnr_to_float32: float | None
    """In dB, the mean; None for equal pictures."""
    psnr_to_bfloat16: float | None
    worst_psnr_to_bfloat16: float | None
    right: float
    """Share of pictures that show what their prompt says."""


@dataclass(frozen=True)
class Drawn:
    """What one model makes of all cases."""

    velocities: list[torch.Tensor]
    images: list[Image]


def draw(dtype: torch.dtype, performance: Performance, studio: Studio) -> Drawn:
    """One step and one picture of each case."""
    folder = ModelFolder(WEIGHTS.name, "local", WEIGHTS)
    model = Flux2Model.load(folder, torch.device("cpu"), dtype, performance=performance)
    if model.performance != performance:
        raise SystemExit(str(model.performance))
    schedule = schedule_for("none", studio.num_steps)
    images = []
    for case in track(studio.cases, str(dtype), transient=True):
        request = Params(case.embedding, studio.side, studio.side, GUIDANCE, case.seed, schedule)
        images.append(model.generate(request).image)
    return Drawn([velocity(model, case, studio.side) for case in studio.cases], images)


@torch.no_grad()
def velocity(model: Flux2Model, case: Case, side: int) -> torch.Tensor:
    """The transformer's answer to latents that depend on the case alone, in float32."""
    transformer = model.components.transformer
    tokens = side // model.info.pixels_per_token
    noise = torch.Generator().manual_seed(case.seed)
    ranges = (1, tokens, tokens, 1), (1, 1, 1, case.embedding.shape[1])
    image_ids, text_ids = (torch.cartesian_prod(*(torch.arange(n) for n in counts)) for counts in ranges)
    latents = torch.randn(1, tokens**2, transformer.config.in_channels, generator=noise)
    answer: torch.Tensor = transformer(
        hidden_states=latents.to(model.dtype),
        timestep=torch.full([1], SIGMA, dtype=model.dtype),
        guidance=torch.full([1], GUIDANCE),
        encoder_hidden_states=case.embedding.to(model.dtype),
        img_ids=image_ids,
        txt_ids=text_ids,
        return_dict=False,
    )[0]
    return answer.float()


def relative_error(ours: Drawn, theirs: Drawn) -> float:
    """Of the steps, the mean over all cases."""
    pairs = zip(ours.velocities, theirs.velocities, strict=True)
    return float(np.mean([float((a - b).norm() / b.norm()) for a, b in pairs]))


def psnrs(ours: Sequence[Image], theirs: Sequence[Image]) -> list[float]:
    """Of each pair of pictures, in dB."""
    return [psnr(pixels(a), pixels(b), peak=255) for a, b in zip(ours, theirs, strict=True)]


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if np.isfinite(value) else None


def row(name: str, drawn: Drawn, single: Drawn, half: Drawn, studio: Studio) -> Row:
    """The figures of one way."""
    to_half = psnrs(drawn.images, half.images)
    shown = [torch.from_numpy(pixels(image)).permute(2, 0, 1) for image in drawn.images]
    right = [not mistakes(c.scene, read_image(p)) for c, p in zip(studio.cases, shown, strict=True)]
    return Row(
        name,
        relative_error(drawn, single),
        relative_error(drawn, half),
        finite(float(np.mean(psnrs(drawn.images, single.images)))),
        finite(float(np.mean(to_half))),
        finite(min(to_half)),
        float(np.mean(right)),
    )


def main() -> None:
    """Draw, compare, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    studio = Studio(args.prompts, args.steps, args.side)
    single = draw(torch.float32, EXACT, studio)
    assert single.images[0].tobytes() == to_pil(studio.references[0]).tobytes()  # diffusers' own
    half = draw(torch.bfloat16, EXACT, studio)
    methods = {"float32": single, "bfloat16": half}
    if find_spec("torchao") is not None:
        import torchao.float8.inference as support  # noqa: PLC0415 - an extra

        support.is_MI300 = lambda: True
        methods["bfloat16, fp8 in the blocks"] = draw(torch.bfloat16, FP8, studio)
    rows = [row(name, drawn, single, half, studio) for name, drawn in methods.items()]
    table = Table("computed in", "step to f32", "step to bf16", "dB to f32", "dB to bf16", "worst", "right")
    for each in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else v or "equal" for v in asdict(each).values()))
    Console(width=120).print(table)
    about = {"benchmark": "precision", "card": machine_card(), "weights": "the demo model", **vars(args)}
    print(json.dumps(about | {"rows": [asdict(each) for each in rows]}))


if __name__ == "__main__":
    main()
