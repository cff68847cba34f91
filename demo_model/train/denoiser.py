"""Stage 3: train the demo model's ``Flux2Transformer2DModel`` and its text encoder together, by flow matching."""

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch import nn
from torch.nn import functional
from transformers import Mistral3ForConditionalGeneration, PreTrainedTokenizerFast

from demo_model.scenes import random_layout, render
from demo_model.train.autoencoder import LATENT_CHANNELS, patchify, training_scene
from demo_model.train.checkpoint import load_checkpoint, save_checkpoint
from demo_model.train.prompts import HIDDEN_LAYERS, HIDDEN_SIZE, MAX_SEQUENCE_LENGTH

SIGMA_SHIFT = 1.0
"""Shifts training noise levels like FLUX.2's ``mu``: most are high, where layout and colors are determined."""
EMA_DECAY = 0.998
NUM_HEADS = 5
DECAY_SHARE = 0.3
"""The learning rate is constant, then decays to zero over this last part of the training."""


def make_transformer() -> Flux2Transformer2DModel:
    """Create a small FLUX.2 transformer."""
    return Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=NUM_HEADS,
        joint_attention_dim=len(HIDDEN_LAYERS) * HIDDEN_SIZE,
        timestep_guidance_channels=64,
        axes_dims_rope=(8, 8, 8, 8),
    )


class Denoiser(nn.Module):
    """The transformer and the text encoder, which are trained together."""

    def __init__(self, transformer: Flux2Transformer2DModel, text_encoder: Mistral3ForConditionalGeneration) -> None:
        super().__init__()
        self.transformer: Any = transformer
        self.text_encoder: Any = text_encoder


@dataclass(frozen=True)
class Examples:
    """Encoded training images: latents ``[N, H * W, C]``, token ids and attention masks ``[N, L]``."""

    latents: torch.Tensor
    image_ids: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor

    def __len__(self) -> int:
        return len(self.latents)


def tokenize(tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenize prompts like ``Flux2Pipeline``: token ids and attention mask, ``[B, L]`` each."""
    batch: Any = tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding="max_length",
        truncation=True,
        max_length=MAX_SEQUENCE_LENGTH,
    )
    return batch["input_ids"], batch["attention_mask"]


@torch.no_grad()
def make_examples(
    autoencoder: AutoencoderKLFlux2, tokenizer: PreTrainedTokenizerFast, rng: random.Random, count: int, size: int
) -> Examples:
    """Render and encode ``count`` scenes of ``size`` x ``size`` pixels that are not held out."""
    mean = autoencoder.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(autoencoder.bn.running_var.view(1, -1, 1, 1) + autoencoder.config.batch_norm_eps)
    latents: list[torch.Tensor] = []
    prompts: list[str] = []
    while len(prompts) < count:
        batch = [training_scene(rng) for _ in range(32)]
        prompts += [scene.prompt for scene in batch]
        images = torch.stack([render(scene, random_layout(scene, rng), size, size) for scene in batch])
        encoded = (patchify(autoencoder.encode(images).latent_dist.mode()) - mean) / std
        latents.append(encoded.flatten(2).transpose(1, 2))
        if len(prompts) % 3200 == 0:
            print(f"examples {len(prompts)}/{count}", flush=True)
    side = torch.arange(size // 16)
    image_ids = torch.cartesian_prod(torch.arange(1), side, side, torch.arange(1))
    return Examples(torch.cat(latents), image_ids, *tokenize(tokenizer, prompts))


def embed(
    encoder: Mistral3ForConditionalGeneration, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """Compute prompt embeddings ``[B, L, layers * hidden]`` of ``HIDDEN_LAYERS`` with gradients."""
    language_model = encoder.model.language_model
    output = language_model(input_ids, attention_mask=attention_mask, output_hidden_states=True, use_cache=False)
    return torch.cat([output.hidden_states[layer] for layer in HIDDEN_LAYERS], dim=-1)


def optimizers(model: nn.Module, lr: float) -> tuple[torch.optim.Muon, torch.optim.AdamW]:
    """Create Muon for the weight matrices of the blocks, and AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inner = "blocks" in name or "layers" in name
        (matrices if inner and parameter.ndim == 2 else rest).append(parameter)
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    return muon, adam


def flow_matching_loss(model: Denoiser, examples: Examples, chosen: torch.Tensor) -> torch.Tensor:
    """Compute the mean squared error of the predicted velocity ``noise - latents`` at random noise levels."""
    clean = examples.latents[chosen]
    noise = torch.randn_like(clean)
    u = (torch.arange(len(chosen)) + torch.rand(len(chosen))) / len(chosen)  # stratified
    shift = math.exp(SIGMA_SHIFT)
    sigma = shift * u / (shift * u + 1 - u)
    noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1))
    text_ids = torch.cartesian_prod(*[torch.arange(n) for n in (1, 1, 1, MAX_SEQUENCE_LENGTH)])
    velocity = model.transformer(
        hidden_states=noisy,
        timestep=sigma,
        guidance=1 + 5 * torch.rand(len(chosen)),
        encoder_hidden_states=embed(model.text_encoder, examples.input_ids[chosen], examples.attention_mask[chosen]),
        txt_ids=text_ids,
        img_ids=examples.image_ids,
        return_dict=False,
    )[0]
    return functional.mse_loss(velocity, noise - clean)


def take_step(optimizers: Sequence[torch.optim.Optimizer], rate: float) -> None:
    """Take a step with a learning rate, and clear the gradients."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def train_denoiser(
    transformer: Flux2Transformer2DModel,
    text_encoder: Mistral3ForConditionalGeneration,
    pools: list[tuple[Examples, int]],
    folder: Path,
    *,
    steps: int,
    lr: float,
    seed: int,
) -> None:
    """Train both models in place, or resume from the checkpoint in ``folder``; they end with their averaged weights.

    ``pools`` are pairs of examples and a batch size; the first is used in nine of ten steps.
    """
    torch.manual_seed(seed)
    model = Denoiser(transformer, text_encoder).train()
    decay = torch.optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=decay)
    muon, adam = optimizers(model, lr)
    state = {"model": model, "average": average, "Muon": muon, "AdamW": adam}
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.compile(dynamic=False)  # 1.5 times as fast
    start = load_checkpoint(folder / "denoiser.pt", state)
    began, running = time.monotonic(), math.nan
    for step in range(start, steps):
        rate = lr * min(1, (step + 1) / 100, (steps - step) / (DECAY_SHARE * steps))
        examples, batch_size = pools[1] if len(pools) > 1 and step % 10 == 9 else pools[0]
        loss = flow_matching_loss(model, examples, torch.randint(len(examples), (batch_size,)))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        take_step((muon, adam), rate)
        average.update_parameters(model)
        running = loss.item() if math.isnan(running) else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            left = (time.monotonic() - began) / (step + 1 - start) * (steps - step - 1)
            print(f"denoiser {step + 1}/{steps}  loss {running:.4f}  {left / 60:.1f} min left", flush=True)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            save_checkpoint(folder / "denoiser.pt", state, step + 1)
    model.load_state_dict(average.module.state_dict())
    model.eval()
