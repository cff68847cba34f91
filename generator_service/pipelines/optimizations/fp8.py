"""8-bit floating point for the transformer's blocks, by torchao.

Weights are stored in 8 bits with a scale for each row; activations are rounded with a scale for each token while they
are computed. What is no linear layer of a block stays as it is: embedders, modulation, norms and the last projection
are 3 % of the arithmetic, and every token's error in them would last.
"""

import copy
import logging
from typing import Any

import torch
from torch import nn

logger = logging.getLogger("flux2")
MULTIPLE = 16
"""Of which both sides of a matrix must be for 8-bit products."""


def quantize_blocks(transformer: Any) -> None:
    """Replace the weights of the blocks' linear layers, block by block, so that memory only shrinks.

    Raises:
        RuntimeError, AssertionError, ImportError: torchao cannot do it here; nothing was changed.
    """
    from torchao.quantization import (  # noqa: PLC0415 - an extra, which prints when it is imported
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
    """Whether it is a linear layer of a fitting shape."""
    return isinstance(module, nn.Linear) and module.in_features % MULTIPLE == 0 and module.out_features % MULTIPLE == 0


@torch.no_grad()
def _try(block: nn.Module, quantise: Any) -> None:
    """Quantise and run a copy of one layer."""
    layer = next(module for module in block.modules() if isinstance(module, nn.Linear) and is_suited(module))
    zeros = torch.zeros(MULTIPLE, layer.in_features, device=layer.weight.device, dtype=layer.weight.dtype)
    copied = nn.Sequential(copy.deepcopy(layer))
    quantise(copied)
    copied(zeros)
