"""Measures the effect of lower precision on images of the demo model: ``python -m benchmarks.generator.precision``.

Generates held-out prompts with every step computed in float32, bfloat16, and bfloat16 with the blocks' linear layers in
8 bits (needs torchao, extra ``quantization``). Each is compared to float32 and to bfloat16: one step on the same
latents, and whole images with 8 bits per channel. torchao requires a GPU of compute capability 8.9; CPUs support the
same products, so its check is patched. Prints a table and, as the last line, JSON.
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

from benchmarks.lemica.evaluator import GUIDANCE, Case, Evaluator
from benchmarks.report.system_info import system_info
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
"""Noise level of the single step."""


@dataclass(frozen=True)
class Row:
    """Results of one precision."""

    name: str
    step_error_to_float32: float
    """Relative error of the velocity, in the L2 norm, on the same latents."""
    step_error_to_bfloat16: float
    psnr_to_float32: float | None
    """Mean in dB; None for equal images."""
    psnr_to_bfloat16: float | None
    worst_psnr_to_bfloat16: float | None
    right: float
    """Share of images that show their prompt."""


@dataclass(frozen=True)
class Outputs:
    """Outputs of a model for all cases."""

    velocities: list[torch.Tensor]
    images: list[Image]


def run(dtype: torch.dtype, performance: Performance, evaluator: Evaluator) -> Outputs:
    """Compute one step and one image of each case."""
    folder = ModelFolder(WEIGHTS.name, "local", WEIGHTS)
    model = Flux2Model.load(folder, torch.device("cpu"), dtype, performance=performance)
    if model.performance != performance:
        raise SystemExit(str(model.performance))
    schedule = schedule_for("none", evaluator.num_steps)
    images = []
    for case in track(evaluator.cases, str(dtype), transient=True):
        request = Params(case.embedding, evaluator.side, evaluator.side, GUIDANCE, case.seed, schedule)
        images.append(model.generate(request).image)
    return Outputs([velocity(model, case, evaluator.side) for case in evaluator.cases], images)


@torch.no_grad()
def velocity(model: Flux2Model, case: Case, side: int) -> torch.Tensor:
    """Return the transformer's output for latents that only depend on the case, in float32."""
    transformer = model.components.transformer
    tokens = side // model.info.pixels_per_token
    noise = torch.Generator().manual_seed(case.seed)
    ranges = (1, tokens, tokens, 1), (1, 1, 1, case.embedding.shape[1])
    image_ids, text_ids = (torch.cartesian_prod(*(torch.arange(n) for n in counts)) for counts in ranges)
    latents = torch.randn(1, tokens**2, transformer.config.in_channels, generator=noise)
    output: torch.Tensor = transformer(
        hidden_states=latents.to(model.dtype),
        timestep=torch.full([1], SIGMA, dtype=model.dtype),
        guidance=torch.full([1], GUIDANCE),
        encoder_hidden_states=case.embedding.to(model.dtype),
        img_ids=image_ids,
        txt_ids=text_ids,
        return_dict=False,
    )[0]
    return output.float()


def relative_error(ours: Outputs, theirs: Outputs) -> float:
    """Return the mean relative error of the steps over all cases."""
    pairs = zip(ours.velocities, theirs.velocities, strict=True)
    return float(np.mean([float((a - b).norm() / b.norm()) for a, b in pairs]))


def psnrs(ours: Sequence[Image], theirs: Sequence[Image]) -> list[float]:
    """Return the PSNR of each pair of images, in dB."""
    return [psnr(pixels(a), pixels(b), peak=255) for a, b in zip(ours, theirs, strict=True)]


def finite(value: float) -> float | None:
    """Replace infinity, which JSON does not support, by None."""
    return value if np.isfinite(value) else None


def row(name: str, outputs: Outputs, single: Outputs, half: Outputs, evaluator: Evaluator) -> Row:
    """Compute the results of one precision."""
    to_half = psnrs(outputs.images, half.images)
    shown = [torch.from_numpy(pixels(image)).permute(2, 0, 1) for image in outputs.images]
    right = [not mistakes(c.scene, read_image(p)) for c, p in zip(evaluator.cases, shown, strict=True)]
    return Row(
        name,
        relative_error(outputs, single),
        relative_error(outputs, half),
        finite(float(np.mean(psnrs(outputs.images, single.images)))),
        finite(float(np.mean(to_half))),
        finite(min(to_half)),
        float(np.mean(right)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generator.precision", description=__doc__)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    evaluator = Evaluator(args.prompts, args.steps, args.side)
    single = run(torch.float32, EXACT, evaluator)
    assert single.images[0].tobytes() == to_pil(evaluator.references[0]).tobytes()  # those of diffusers
    half = run(torch.bfloat16, EXACT, evaluator)
    methods = {"float32": single, "bfloat16": half}
    if find_spec("torchao") is not None:
        import torchao.float8.inference as support  # noqa: PLC0415 - an optional dependency

        support.is_MI300 = lambda: True
        methods["bfloat16, fp8 in the blocks"] = run(torch.bfloat16, FP8, evaluator)
    rows = [row(name, outputs, single, half, evaluator) for name, outputs in methods.items()]
    table = Table("computed in", "step to f32", "step to bf16", "dB to f32", "dB to bf16", "worst", "right")
    for each in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else v or "equal" for v in asdict(each).values()))
    Console(width=120).print(table)
    about = {"benchmark": "precision", "card": system_info(), "weights": "the demo model", **vars(args)}
    print(json.dumps(about | {"rows": [asdict(each) for each in rows]}))


if __name__ == "__main__":
    main()
