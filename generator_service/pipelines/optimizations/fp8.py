"""Quantizes the transformer's blocks to 8-bit floating point with torchao.

Weights have a scale per row, activations a dynamic scale per token. Only linear layers of blocks are quantized.
Embedders, modulation, norms and the last projection are 3 % of the arithmetic, and their errors affect every token.
"""

import copy
import logging
from typing import Any

import torch
from torch import nn

logger = logging.getLogger("flux2")
MULTIPLE = 16
"""Both sides of a matrix must be multiples of this for 8-bit products."""


def quantize_blocks(transformer: Any) -> None:
    """Quantize the linear layers block by block, so that memory usage never grows.

    Raises:
        RuntimeError, AssertionError, ImportError: torchao does not support this device; nothing was changed.
    """
    from torchao.quantization import (  # noqa: PLC0415 - an optional dependency, which prints on import
        Float8DynamicActivationFloat8WeightConfig,
        PerRow,
        quantize_,
    )

    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    _try(blocks[0], lambda layer: quantize_(layer, config))
    for block in blocks:
        quantize_(block, config, filter_fn=lambda module, _name: is_suited(module))


def is_suited(module: nn.Module) -> bool:
    """Return whether a module is a linear layer of a supported shape."""
    return isinstance(module, nn.Linear) and module.in_features % MULTIPLE == 0 and module.out_features % MULTIPLE == 0


@torch.no_grad()
def _try(block: nn.Module, quantize: Any) -> None:
    """Quantize and run a copy of a layer."""
    layer = next(module for module in block.modules() if isinstance(module, nn.Linear) and is_suited(module))
    zeros = torch.zeros(MULTIPLE, layer.in_features, device=layer.weight.device, dtype=layer.weight.dtype)
    copied = nn.Sequential(copy.deepcopy(layer))
    quantize(copied)
    copied(zeros)
