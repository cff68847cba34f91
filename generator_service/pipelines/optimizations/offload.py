"""The transformer's blocks in host memory, each on the GPU only while it is needed: for cards of 24 to 48 GB.

The weights of the next block are copied, on a stream of their own, while a block computes. The rest of the transformer
stays on the GPU, so a reused step copies nothing. Diffusers' group offloading does the work; here the blocks alone are
given to it, in their fixed order, where diffusers would find out the order by watching whole forward passes.
"""

from itertools import pairwise
from typing import Any

import torch
from diffusers.hooks import HookRegistry, apply_group_offloading
from torch import nn

HOOK = "group_offloading"
"""As diffusers calls it."""
ALIGNMENT = 64
"""Of weights in a block's memory, in bytes."""


class _Blocks(nn.Module):
    """What is offloaded; diffusers looks for lists of blocks in a module."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer_blocks = transformer.transformer_blocks
        self.single_transformer_blocks = transformer.single_transformer_blocks


def offload_blocks(transformer: Any, device: torch.device) -> None:
    """Move everything but the blocks to ``device``, and the blocks when they run.

    Args:
        transformer: diffusers' ``Flux2Transformer2DModel``, in host memory. Its blocks are pinned if ``device`` is a
            GPU.
        device: where it computes; the current one if it is a GPU.
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
        # A block's weights are freed when the GPU has used them. With True the host would not wait for that: where
        # computing takes longer than copying, it would run ahead until the copies of all blocks fill the GPU.
        record_stream=False,
    )
    _chain(ordered)


def gather_weights(block: nn.Module, *, is_pinned: bool) -> None:
    """Move the weights of a block into one piece of host memory.

    PyTorch gives pinned memory in powers of two. FLUX.2 [dev]'s blocks nearly are ones, 69 GB in all; its 62.8 GB of
    weights, which diffusers would pin one by one, would take 99 GB.

    Args:
        block: its parameters are replaced.
        is_pinned: whether a GPU can copy from there by itself.
    """
    parameters = list(block.parameters())
    sizes = gathered_sizes(block)
    memory = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=is_pinned)
    for parameter, piece in zip(parameters, torch.split(memory, sizes), strict=True):
        place = piece[: parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        parameter.data = place.copy_(parameter.data)


def gathered_sizes(block: nn.Module) -> list[int]:
    """The bytes that each parameter of a block takes in its piece of host memory."""
    return [-(-parameter.nbytes // ALIGNMENT) * ALIGNMENT for parameter in block.parameters()]


def _chain(blocks: list[nn.Module]) -> None:
    """Have each block's weights copied by the block before it, and the first one's by the last.

    A block whose weights are not there, because the run before was given up half way, fetches them itself and waits.
    """
    hooks = [HookRegistry.check_if_exists_or_initialize(block).get_hook(HOOK) for block in blocks]
    for before, after in pairwise([*hooks, hooks[0]]):
        before.next_group = after.group
        after.group.onload_self = False
