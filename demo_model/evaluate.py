"""Measures how well the demo model follows held-out prompts: ``python -m demo_model.evaluate``."""

import argparse
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from demo_model.checker import mistakes, read_image
from demo_model.scenes import Scene, scenes
from demo_model.services import WEIGHTS
from flux2_shared.model.folder import ModelFolder, read_prompt_format
from generator_service.lemica import schedule_for
from generator_service.pipelines.flux2 import Flux2Model
from generator_service.pipelines.params import Params
from text_encoder_service.encoder import MistralEncoder

CPU = torch.device("cpu")
NUM_STEPS = 50


class ImageGenerator:
    """The demo model with its text encoder, in this process."""

    def __init__(self, weights: Path = WEIGHTS) -> None:
        folder = ModelFolder(weights.name, "local", weights)
        self._encoder = MistralEncoder(folder, read_prompt_format(folder), CPU, torch.float32)
        self._model = Flux2Model.load(folder, CPU, torch.float32)

    def generate(self, prompt: str, seed: int, *, cache: str | int = "none", side: int = 128) -> Image.Image:
        embedding = self._encoder.encode([prompt])[0].tensor
        schedule = schedule_for(cache, NUM_STEPS)
        return self._model.generate(Params(embedding, side, side, 4.0, seed, schedule)).image


def judge(image: Image.Image, scene: Scene) -> list[str]:
    """List the differences between ``image`` and ``scene``."""
    return mistakes(scene, read_image(torch.from_numpy(np.array(image)).permute(2, 0, 1)))


def evaluate(generator: ImageGenerator, num_things: int, count: int, *, cache: str | int, side: int) -> Counter[str]:
    """Count the mistakes in images of ``count`` held-out prompts; images without mistakes count as ``right``."""
    held_out = scenes(random.Random(num_things), count, num_things, held_out=True)
    result: Counter[str] = Counter()
    for seed, scene in enumerate(track(held_out, f"{num_things} thing(s)", transient=True)):
        wrong = judge(generator.generate(scene.prompt, seed, cache=cache, side=side), scene)
        result.update(wrong or ["right"])
    return result


def main() -> None:
    """Evaluate prompts with one and with two things; print a table and a final JSON line."""
    parser = argparse.ArgumentParser(prog="python -m demo_model.evaluate", description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--cache", default="none")
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    generator = ImageGenerator(args.weights)
    results = {n: evaluate(generator, n, args.count, cache=args.cache, side=args.side) for n in (1, 2)}
    table = Table("things", "wholly right", "mistakes", title=f"{args.count} held-out prompts each, cache {args.cache}")
    for num_things, result in results.items():
        wrong = ", ".join(f"{name} {number}" for name, number in result.most_common() if name != "right")
        table.add_row(str(num_things), f"{result['right'] / args.count:.1%}", wrong)
    Console().print(table)
    print(json.dumps({"count": args.count, "cache": args.cache, "side": args.side, "mistakes": results}))


if __name__ == "__main__":
    main()
