"""Weight-only quantization of the decoder layers to 8 or 4 bits by torchao: less memory, less accurate embeddings.

Activations and arithmetic keep the model's dtype. torchao is imported lazily, because it is an optional dependency and
prints warnings about missing kernels when it is imported.
"""

from typing import Any

import torch
from torch import nn

from flux2_shared.errors import ModelRefused
from text_encoder_service.settings import Weights


def quantize(layers: nn.ModuleList, weights: Weights, device: torch.device) -> None:
    """Quantize the linear weights of ``layers`` in place, moving one layer at a time to ``device``.

    At most one layer of unquantized weights is on ``device`` at a time.

    Args:
        layers: layers on any device; on ``device`` afterwards.
        weights: ``int8`` has one scale per output channel, ``int4`` a scale and a zero point per 128 weights.
        device: the device that the model will run on.

    Raises:
        ModelRefused: torchao is not installed, or does not support ``weights`` on this device or in this dtype.
    """
    dtype = next(layers.parameters()).dtype
    if weights == "int4" and (device.type, dtype) != ("cuda", torch.bfloat16):
        raise ModelRefused("TEXT_ENCODER_WEIGHTS=int4 needs an NVIDIA GPU and bfloat16")
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_  # noqa: PLC0415
    except ImportError as error:
        raise ModelRefused(
            f"TEXT_ENCODER_WEIGHTS={weights} needs torchao: install flux2-services[quantization]"
        ) from error
    # set_inductor_config=True would change the compiler's settings for the whole process.
    config: Any = (
        Int8WeightOnlyConfig(set_inductor_config=False)
        if weights == "int8"
        else Int4WeightOnlyConfig(int4_packing_format="tile_packed_to_4d", set_inductor_config=False)
    )
    for layer in layers:
        quantize_(layer.to(device), config)
