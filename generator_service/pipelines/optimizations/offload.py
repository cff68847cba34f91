"""Keeps the transformer's blocks in host memory and copies each to the GPU when it runs, for GPUs of 24 to 48 GB.

While a block computes, the weights of the next one are copied on another stream. The rest of the transformer stays on
the GPU, so reused steps copy nothing. This uses diffusers' group offloading for the blocks only, in their fixed order;
diffusers would otherwise determine the order by tracing whole forward passes.
"""

from itertools import pairwise
from typing import Any

import torch
from diffusers.hooks import HookRegistry, apply_group_offloading
from torch import nn

HOOK = "group_offloading"
"""Diffusers' name of the hook."""
ALIGNMENT = 64
"""Alignment of each weight in a block's memory, in bytes."""


class _Blocks(nn.Module):
    """Module with only the offloaded blocks, because diffusers searches a module for lists of blocks."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer_blocks = transformer.transformer_blocks
        self.single_transformer_blocks = transformer.single_transformer_blocks


def offload_blocks(transformer: Any, device: torch.device) -> None:
    """Move the transformer to ``device``, except its blocks, which are copied when they run.

    Args:
        transformer: diffusers' ``Flux2Transformer2DModel``, in host memory. Its blocks are pinned if ``device`` is a
            GPU.
        device: compute device; must be the current device if it is a GPU.
    """
    blocks = _Blocks(transformer)
    offloaded = {name for name, _ in blocks.named_children()}
    for name, child in transformer.named_children():
        if name not in offloaded:
            child.to(device)
    is_gpu = device.type == "cuda"
    ordered = [*blocks.transformer_blocks, *blocks.single_transformer_blocks]
    for block in ordered:
        gather_weights(block, is_pinned=is_gpu)
    apply_group_offloading(
        blocks,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=is_gpu,
        # With False, the host waits until the GPU has used a block's weights before it frees them. With True, where
        # computing takes longer than copying, the host would run ahead until the copies of all blocks fill the GPU.
        record_stream=False,
    )
    _chain(ordered)


def gather_weights(block: nn.Module, *, is_pinned: bool) -> None:
    """Move the weights of a block into one allocation of host memory.

    PyTorch allocates pinned memory in powers of two. The sizes of FLUX.2 [dev]'s blocks are just below powers of two:
    69 GB in total. Pinning each of its weights (62.8 GB) separately, as diffusers does, would take 99 GB.

    Args:
        block: its parameters are replaced.
        is_pinned: whether to allocate pinned memory.
    """
    parameters = list(block.parameters())
    sizes = gathered_sizes(block)
    memory = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=is_pinned)
    for parameter, piece in zip(parameters, torch.split(memory, sizes), strict=True):
        place = piece[: parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        parameter.data = place.copy_(parameter.data)


def gathered_sizes(block: nn.Module) -> list[int]:
    """Return the aligned size of each parameter of a block, in bytes."""
    return [-(-parameter.nbytes // ALIGNMENT) * ALIGNMENT for parameter in block.parameters()]


def _chain(blocks: list[nn.Module]) -> None:
    """Let each block prefetch the weights of the next one, and the last block those of the first one.

    If the weights of a block are missing, because the previous run was cancelled, the block copies them itself.
    """
    hooks = [HookRegistry.check_if_exists_or_initialize(block).get_hook(HOOK) for block in blocks]
    for before, after in pairwise([*hooks, hooks[0]]):
        before.next_group = after.group
        after.group.onload_self = False
