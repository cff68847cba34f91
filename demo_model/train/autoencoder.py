"""Stage 1: train the demo model's ``AutoencoderKLFlux2`` on rendered scenes, then its decoder only."""

import math
import random
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn import functional

from demo_model.scenes import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    Scene,
    paint,
    random_layout,
    random_scene,
    render,
    shape_masks,
)
from demo_model.train.checkpoint import load_checkpoint, save_checkpoint

KL_WEIGHT = 2e-4
"""Relative to the mean error per value: small enough for sharp edges, large enough for a smooth latent space."""
RANDOM_COLOR_SHARE = 0.3
NUM_POOL_IMAGES = 4096
LATENT_CHANNELS = 8
FIRST_LOG_VARIANCE = -4.0
IMAGE_SIZE = 128
CROP_SIZE = 64
LATENT_NOISE = 0.1
"""Maximum noise on latents while only the decoder is trained, as a share of their standard deviation."""
WHOLE_SHARE = 0.15
"""The last part of the training uses whole images, the rest crops, which cost a quarter."""


def make_autoencoder() -> AutoencoderKLFlux2:
    """Create a small FLUX.2 autoencoder: latents of 8 channels at 1/8 of the size, patched 2 x 2 into 32 channels."""
    model = AutoencoderKLFlux2(
        block_out_channels=(8, 16, 32, 64),
        decoder_block_out_channels=(16, 16, 48, 96),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        sample_size=128,
        mid_block_add_attention=False,
    )
    start_as_blur(model)
    return model


def add_identity(conv: nn.Conv2d, kernel: torch.Tensor) -> None:
    """Initialize ``conv`` to apply ``kernel`` to each channel, plus a tenth of its random weights."""
    conv.weight.mul_(0.1)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    for channel in range(min(conv.in_channels, conv.out_channels)):
        conv.weight[channel, channel] += kernel


@torch.no_grad()
def start_as_blur(model: AutoencoderKLFlux2) -> None:
    """Initialize the network near the identity on 8 x 8 averages, with little noise, instead of at random.

    Normalization hides a flat image's color from a deep random network: after 300 steps it reached 14 dB, with this
    initialization 23 dB. The trunk carries the three colors, their negatives (so that SiLU loses nothing) and a
    constant pair that fixes the scale of the norms; residual branches start small.
    """
    center = functional.pad(torch.ones(1, 1), (1, 1, 1, 1))
    for module in model.modules():
        if isinstance(module, ResnetBlock2D):
            module.conv2.weight.mul_(0.1)
            nn.init.zeros_(module.conv2.bias)
            if module.conv_shortcut is not None:
                add_identity(module.conv_shortcut, torch.ones(1, 1))
        elif isinstance(module, Downsample2D):
            add_identity(module.conv, torch.full((3, 3), 1 / 9))
        elif isinstance(module, Upsample2D):
            add_identity(module.conv, center)
    for half in (model.encoder, model.decoder):
        half.conv_in.weight[:8].mul_(0.1)
        half.conv_in.bias[:8] = torch.tensor([0.0, 0, 0, 0, 0, 0, 1, -1])
        half.conv_out.weight[:3].mul_(0.1)
        for channel in range(3):
            half.conv_in.weight[channel, channel] += center
            half.conv_in.weight[channel + 3, channel] -= center
            half.conv_out.weight[channel, channel] += center
            half.conv_out.weight[channel, channel + 3] -= center
    add_identity(model.quant_conv, torch.ones(1, 1))
    add_identity(model.post_quant_conv, torch.ones(1, 1))
    model.quant_conv.weight[LATENT_CHANNELS:].mul_(0.1)
    model.quant_conv.bias[LATENT_CHANNELS:] = FIRST_LOG_VARIANCE


def training_scene(rng: random.Random) -> Scene:
    """Sample a scene with one or two things that is not held out."""
    while (scene := random_scene(rng, rng.choice((1, 2)))).is_held_out:
        pass
    return scene


def training_image(rng: random.Random, size: int) -> torch.Tensor:
    """Render a scene, or shapes in random colors so that the autoencoder is not limited to the palette."""
    if rng.random() > RANDOM_COLOR_SHARE:
        scene = training_scene(rng)
        return render(scene, random_layout(scene, rng), size, size)
    palette = list(COLORS.values()) + list(BACKGROUNDS.values())
    colors = [(rng.randrange(256), rng.randrange(256), rng.randrange(256)) for _ in range(3)]
    colors[0] = rng.choice([colors[0], *palette])
    masks = []
    for _ in range(rng.choice((1, 2))):
        center = (rng.uniform(-0.4, 0.4), rng.uniform(-0.4, 0.4))
        masks.append(shape_masks(center, rng.uniform(0.08, 0.3), size, size)[rng.randrange(len(SHAPES))])
    return paint(colors[0], colors[1 : 1 + len(masks)], masks)


def random_crops(images: torch.Tensor, size: int) -> torch.Tensor:
    """Crop a random window from each image: ``[B, 3, size, size]``."""
    highest = images.shape[-1] - size + 1
    corners = torch.randint(highest, (len(images), 2)).tolist()
    return torch.stack([p[:, y : y + size, x : x + size] for p, (y, x) in zip(images, corners, strict=True)])


def training_batch(pool: torch.Tensor, step: int, steps: int, batch_size: int) -> torch.Tensor:
    """Sample a batch: crops at first, later whole images (a third as many)."""
    if step < steps * (1 - WHOLE_SHARE):
        return random_crops(pool[torch.randint(len(pool), (batch_size,))], CROP_SIZE)
    return pool[torch.randint(len(pool), (batch_size // 3,))]


def train_autoencoder(folder: Path, *, steps: int, batch_size: int, seed: int) -> AutoencoderKLFlux2:
    """Train, or resume from the checkpoint in ``folder``, and return the model with fitted latent statistics."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = make_autoencoder().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps + 1, pct_start=0.05)
    state = {"model": model, "optimizer": optimizer, "schedule": schedule}
    start = load_checkpoint(folder / "autoencoder.pt", state)
    pool = torch.stack([training_image(rng, IMAGE_SIZE) for _ in range(NUM_POOL_IMAGES)])
    began = time.monotonic()
    for step in range(start, steps):
        images = training_batch(pool, step, steps, batch_size)
        posterior = model.encode(images).latent_dist
        reconstruction = model.decode(posterior.sample()).sample
        error = functional.l1_loss(reconstruction, images)
        mse = functional.mse_loss(reconstruction, images)
        loss = error + 2 * mse + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            left = (time.monotonic() - began) / (step + 1 - start) * (steps - step - 1)
            print(
                f"autoencoder {step + 1}/{steps}  L1 {error.item():.4f}  PSNR {10 * math.log10(4 / mse.item()):.1f} dB"
                f"  latent std {posterior.mean.std().item():.2f} noise {posterior.std.mean().item():.3f}"
                f"  {left / 60:.1f} min left",
                flush=True,
            )
        if (step + 1) % 250 == 0 or step + 1 == steps:
            save_checkpoint(folder / "autoencoder.pt", state, step + 1)
    fit_latent_statistics(model.eval(), pool[:512])
    return model


def train_decoder(model: AutoencoderKLFlux2, folder: Path, *, steps: int, batch_size: int, seed: int) -> None:
    """Train only the decoder of ``model``, in place, on whole images; latents and their statistics do not change.

    After training on crops small things are blurred: a quarter of the small diamonds looked like circles.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    half = nn.ModuleList([model.post_quant_conv, model.decoder]).train()
    optimizer = torch.optim.AdamW(half.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps + 1, pct_start=0.05)
    state = {"decoder": half, "optimizer": optimizer, "schedule": schedule}
    start = load_checkpoint(folder / "decoder.pt", state)
    if start < steps:
        pool = torch.stack([training_image(rng, IMAGE_SIZE) for _ in range(2 * NUM_POOL_IMAGES)])
        with torch.no_grad():
            latents = torch.cat([model.encode(batch).latent_dist.mode() for batch in pool.split(32)])
    for step in range(start, steps):
        chosen = torch.randint(len(pool), (batch_size,))
        noise = LATENT_NOISE * torch.rand(batch_size, 1, 1, 1) * latents.std() * torch.randn_like(latents[chosen])
        reconstruction = model.decode(latents[chosen] + noise).sample
        mse = functional.mse_loss(reconstruction, pool[chosen])
        loss = functional.l1_loss(reconstruction, pool[chosen]) + 2 * mse
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(half.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            print(f"decoder {step + 1}/{steps}  PSNR {10 * math.log10(4 / mse.item()):.1f} dB", flush=True)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            save_checkpoint(folder / "decoder.pt", state, step + 1)
    model.eval()


@torch.no_grad()
def fit_latent_statistics(model: AutoencoderKLFlux2, images: torch.Tensor) -> None:
    """Set ``bn``'s running mean and variance to those of the patched latents of ``images``."""
    latents = torch.cat([patchify(model.encode(batch).latent_dist.mode()) for batch in images.split(32)])
    model.bn.running_mean.copy_(latents.mean(dim=(0, 2, 3)))
    model.bn.running_var.copy_(latents.var(dim=(0, 2, 3)))


def patchify(latents: torch.Tensor) -> torch.Tensor:
    """Patch ``[B, C, 2H, 2W]`` to ``[B, 4C, H, W]``, with the channel order of FLUX.2's pipeline."""
    return functional.pixel_unshuffle(latents, 2)
