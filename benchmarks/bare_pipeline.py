"""Diffusers' pipeline with the demo model in a process of its own, as a script would run it, to compare services with.

``python -m benchmarks.bare_pipeline`` is that process. It loads and runs the pipeline on its main thread, with whatever
OpenMP settings the environment has. It reads requests as JSON lines, and answers each with the seconds of every image.
"""

import json
import subprocess
import sys
import time
from types import TracebackType
from typing import Any, Self

import torch
from diffusers import Flux2Pipeline

from benchmarks.card import ROOT
from benchmarks.stopwatch import Stopwatch
from demo_model.services import WEIGHTS
from generator_service.lemica import CachedTransformer, schedule_for

TEXT_TOKENS = 32


class BarePipeline:
    """The process; it runs while a ``with`` block lasts."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.bare_pipeline"],
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
        """The process's id."""
        return self._process.pid

    def run(self, body: dict[str, Any], seconds: float = float("inf"), most: int = 2**31) -> list[float]:
        """Generate images one after the other; the seconds of each.

        Args:
            body: as of ``POST /generate``, of which size, steps and cache count.
            seconds: no further image is begun after so long.
            most: images at most.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"body": body, "seconds": seconds, "most": most}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the process of the bare pipeline has ended; its own message is above")
        found: list[float] = json.loads(answer)
        return found


def run(parts: dict[str, Any], body: dict[str, Any]) -> float:
    """The seconds of one image."""
    began = time.perf_counter()
    num_steps, cache = body["num_inference_steps"], body["cache"]
    if cache != "none":
        schedule = schedule_for(cache, num_steps)
        transformer = CachedTransformer(parts["transformer"], schedule, scheduler=parts["scheduler"])
        parts = {**parts, "transformer": transformer}
    pipeline = Flux2Pipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    embeds = torch.zeros(1, TEXT_TOKENS, parts["transformer"].config.joint_attention_dim)
    pipeline(prompt_embeds=embeds, num_inference_steps=num_steps, width=body["width"], height=body["height"])
    return time.perf_counter() - began


def main() -> None:
    """Answer requests until stdin ends."""
    loaded = Flux2Pipeline.from_pretrained(WEIGHTS, text_encoder=None, tokenizer=None, dtype=torch.float32)
    for line in sys.stdin:
        request = json.loads(line)
        stopwatch = Stopwatch(request["seconds"], request["most"])
        print(json.dumps([run(loaded.components, request["body"]) for _ in stopwatch.rounds()]), flush=True)


if __name__ == "__main__":
    main()
