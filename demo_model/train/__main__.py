"""Trains the demo model from scratch: ``python -m demo_model.train``. Resumes an interrupted run."""

import argparse
import random
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel
from transformers import Mistral3ForConditionalGeneration, PreTrainedTokenizerFast

from demo_model.train.autoencoder import train_autoencoder, train_decoder
from demo_model.train.denoiser import make_examples, make_transformer, train_denoiser
from demo_model.train.prompts import make_text_encoder, make_tokenizer

ROOT = Path(__file__).parent
WEIGHTS = ROOT.parent / "weights"


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Create FLUX.2's scheduler."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift=3.0, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
        max_image_seq_len=4096, time_shift_type="exponential",
    )  # fmt: skip


def save(
    folder: Path,
    autoencoder: AutoencoderKLFlux2,
    transformer: Flux2Transformer2DModel,
    text_encoder: Mistral3ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Write a diffusers pipeline folder in bfloat16, except for the small autoencoder."""
    shutil.rmtree(folder, ignore_errors=True)
    half: Any = text_encoder
    pipeline = Flux2Pipeline(
        scheduler=scheduler(),
        vae=autoencoder,
        text_encoder=half.to(torch.bfloat16),
        tokenizer=tokenizer,
        transformer=transformer.to(torch.bfloat16),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)


def main() -> None:
    """Train the three stages and write ``demo_model/weights``."""
    parser = argparse.ArgumentParser(prog="python -m demo_model.train", description=__doc__)
    parser.add_argument("--autoencoder-steps", type=int, default=2600)
    parser.add_argument("--decoder-steps", type=int, default=2400)
    parser.add_argument("--denoiser-steps", type=int, default=7000)
    parser.add_argument("--examples", type=int, default=24_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoints", type=Path, default=ROOT / "checkpoints")
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    began = time.monotonic()
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer(args.seed)
    text_encoder, transformer = make_text_encoder(tokenizer), make_transformer()
    autoencoder = train_autoencoder(args.checkpoints, steps=args.autoencoder_steps, batch_size=24, seed=args.seed)
    train_decoder(autoencoder, args.checkpoints, steps=args.decoder_steps, batch_size=8, seed=args.seed + 1)
    rng = random.Random(args.seed)
    examples = make_examples(autoencoder, tokenizer, rng, args.examples, size=128)
    large = make_examples(autoencoder, tokenizer, rng, args.examples // 16, size=256)
    train_denoiser(
        transformer, text_encoder, [(examples, 64), (large, 16)], args.checkpoints,
        steps=args.denoiser_steps, lr=2e-3, seed=args.seed,
    )  # fmt: skip
    save(args.output, autoencoder, transformer, text_encoder, tokenizer)
    print(f"wrote {args.output.name}/ after {(time.monotonic() - began) / 60:.0f} min of this run")


if __name__ == "__main__":
    main()
