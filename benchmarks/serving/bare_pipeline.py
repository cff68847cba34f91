"""Runs diffusers' pipeline with the demo model in a separate process, as a baseline for the services.

``python -m benchmarks.serving.bare_pipeline`` is the process. It runs the pipeline on its main thread, with the OpenMP
settings of the environment. It reads requests as JSON lines, and writes the seconds of each image.
"""

import json
import subprocess
import sys
import time
from types import TracebackType
from typing import Any, Self

import torch
from diffusers import Flux2Pipeline

from benchmarks.report.stopwatch import Stopwatch
from benchmarks.report.system_info import ROOT
from demo_model.services import WEIGHTS
from generator_service.lemica import CachedTransformer, schedule_for

TEXT_TOKENS = 32


class BarePipeline:
    """Context manager that runs the process."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.serving.bare_pipeline"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    @property
    def pid(self) -> int:
        return self._process.pid

    def run(self, body: dict[str, Any], seconds: float = float("inf"), max_images: int = 2**31) -> list[float]:
        """Generate images one after the other, and return the seconds of each.

        Args:
            body: body of ``POST /generate``; only size, steps and cache are used.
            seconds: time after which no further image is started.
            max_images: largest number of images.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"body": body, "seconds": seconds, "max_images": max_images}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process of the bare pipeline exited; see its message above")
        timings: list[float] = json.loads(line)
        return timings


def run(components: dict[str, Any], body: dict[str, Any]) -> float:
    """Generate an image, and return its seconds."""
    began = time.perf_counter()
    num_steps, cache = body["num_inference_steps"], body["cache"]
    if cache != "none":
        schedule = schedule_for(cache, num_steps)
        transformer = CachedTransformer(components["transformer"], schedule, scheduler=components["scheduler"])
        components = {**components, "transformer": transformer}
    pipeline = Flux2Pipeline(**components)
    pipeline.set_progress_bar_config(disable=True)
    embeds = torch.zeros(1, TEXT_TOKENS, components["transformer"].config.joint_attention_dim)
    pipeline(prompt_embeds=embeds, num_inference_steps=num_steps, width=body["width"], height=body["height"])
    return time.perf_counter() - began


def main() -> None:
    """Process requests until stdin is closed."""
    loaded = Flux2Pipeline.from_pretrained(WEIGHTS, text_encoder=None, tokenizer=None, dtype=torch.float32)
    for line in sys.stdin:
        request = json.loads(line)
        stopwatch = Stopwatch(request["seconds"], request["max_images"])
        print(json.dumps([run(loaded.components, request["body"]) for _ in stopwatch.rounds()]), flush=True)


if __name__ == "__main__":
    main()
