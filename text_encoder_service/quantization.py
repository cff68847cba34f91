"""The decoder layers' linear weights in 8 or 4 bits, by torchao: less memory, and embeddings that are a little off.

Only the weights are stored so; activations and arithmetic keep the model's dtype. torchao is imported when it is asked
for: it is an optional extra, and its import prints what it finds no kernels for.
"""

from typing import Any

import torch
from torch import nn

from shared.errors import ModelRefused
from text_encoder_service.settings import Weights


def quantize(layers: nn.ModuleList, weights: Weights, device: torch.device) -> None:
    """Quantise the linear weights of ``layers`` in place, one layer after the other on ``device``.

    Args:
        layers: anywhere; on ``device`` afterwards.
        weights: ``int8`` has a scale for each output channel, ``int4`` a scale and a zero for each 128 weights.
        device: where the model will run; it never has more than one layer of full weights.

    Raises:
        ModelRefused: torchao is not installed, or has no ``weights`` for this device or dtype.
    """
    dtype = next(layers.parameters()).dtype
    if weights == "int4" and (device.type, dtype) != ("cuda", torch.bfloat16):
        raise ModelRefused("TEXT_ENCODER_WEIGHTS=int4 needs an NVIDIA GPU and bfloat16")
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_  # noqa: PLC0415
    except ImportError as error:
        told = f"TEXT_ENCODER_WEIGHTS={weights} needs torchao: install flux2-services[quantization]"
        raise ModelRefused(told) from error
    # set_inductor_config would change the compiler's settings of the whole process.
    config: Any = (
        Int8WeightOnlyConfig(set_inductor_config=False)
        if weights == "int8"
        else Int4WeightOnlyConfig(int4_packing_format="tile_packed_to_4d", set_inductor_config=False)
    )
    for layer in layers:
        quantize_(layer.to(device), config)
