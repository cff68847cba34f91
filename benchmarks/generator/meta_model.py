"""Runs the service's model on the meta device, where tensors have sizes but neither values nor memory.

``Flux2Model`` runs there unchanged, from parameters to an image, at full size on any machine;
``benchmarks.generator.memory`` counts the bytes of its tensors. There are three differences from a GPU: values that the
code reads are zero; attention is a fused kernel without the matrix of all pairs of tokens, which PyTorch lacks for meta
tensors; 8-bit layers are implemented like torchao's compiled ones, because torchao cannot compile for this device.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.generator.synthetic import empty_components
from flux2_shared.model.byte_cache import ByteBoundedCache
from flux2_shared.model.folder import ModelFolder
from generator_service.pipelines.components import Components
from generator_service.pipelines.flux2 import Flux2Model
from generator_service.pipelines.optimizations.fp8 import is_suited
from generator_service.pipelines.optimizations.profiles import PROFILES, Performance

aten = torch.ops.aten
META = torch.device("meta")
CPU = torch.device("cpu")
APPLIED = frozenset({"fused_qkv", "vae"})
"""Optimizations that Flux2Model applies on this device; the others do not affect the memory."""


class ReadAsZero(TorchDispatchMode):
    """Makes values that are read from meta tensors zero, instead of raising."""

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].is_meta:  # noqa: SLF001 - called by Tensor.item()
            return torch.zeros((), dtype=args[0].dtype).item()
        if func is aten._to_copy.default and args[0].is_meta and kwargs.get("device") == CPU:  # noqa: SLF001 - Tensor.cpu()
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return func(*args, **kwargs)


class FusedAttention(TorchFunctionMode):
    """Makes attention over meta tensors use the memory of PyTorch's memory-efficient kernel: only its result.

    FlashAttention and cuDNN's kernel also keep a number per row. Masks are neglected, because they have no heads.
    """

    def __torch_function__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = args[:3] or (kwargs["query"], kwargs["key"], kwargs["value"])
        bias, has_row_sums = None, False
        return aten._scaled_dot_product_efficient_attention(query, key, value, bias, has_row_sums)[0]  # noqa: SLF001


class Fp8Linear(nn.Module):
    """A linear layer as created by ``quantize_blocks``: 8-bit weights with a scale per row.

    One kernel rounds the input to 8 bits with a scale per token, as in compiled code.
    """

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__()
        assert layer.bias is None
        self.register_buffer("weight", layer.weight.to(torch.float8_e4m3fn))
        self.register_buffer("scale", layer.weight.new_empty(layer.out_features, 1, dtype=torch.float32))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        rows = hidden.flatten(0, -2).to(torch.float8_e4m3fn)
        scales = hidden.new_empty(len(rows), 1, dtype=torch.float32)
        product = torch._scaled_mm(  # noqa: SLF001 - the function that torchao calls
            rows, self.weight.t(), scale_a=scales, scale_b=self.scale.t(), out_dtype=hidden.dtype
        )
        output: torch.Tensor = product.unflatten(0, hidden.shape[:-1])
        return output


class MetaComponents(Components):
    """Components for square images, whose token positions are computed without reading values."""

    def new_pipeline(self, reference_cache: ByteBoundedCache[torch.Tensor]) -> Any:
        pipeline = super().new_pipeline(reference_cache)
        pipeline._unpack_latents_with_ids = unpack_square  # noqa: SLF001 - only on this object
        return pipeline


def unpack_square(tokens: torch.Tensor, _ids: torch.Tensor) -> torch.Tensor:
    """Map ``[B, tokens, C]`` to ``[B, C, side, side]`` in new memory, like diffusers."""
    side = int(tokens.shape[1] ** 0.5)
    squares: torch.Tensor = tokens.transpose(1, 2).unflatten(2, (side, side)).contiguous()
    return squares


def meta_model(path: Path, profile: str, dtype: torch.dtype = torch.bfloat16) -> Flux2Model:
    """Create the model of a folder's architecture. Run it within ``on_meta``.

    Args:
        path: the folder, whose weights are not loaded.
        profile: a profile that keeps all weights on the GPU.
        dtype: dtype of the weights.
    """
    folder = ModelFolder(path.name, "local", path)
    performance = Performance(profile, PROFILES[profile] & APPLIED)
    with on_meta():
        model = Flux2Model.load(folder, META, dtype, performance=performance, read=read_no_weights)
    if "fp8" in PROFILES[profile]:
        store_in_fp8(model.components.transformer)
    return model


def read_no_weights(
    folder: ModelFolder, device: torch.device, dtype: torch.dtype, transformer_device: torch.device | None = None
) -> Components:
    """Create components on the meta device; a ``ComponentsReader``."""
    del device, transformer_device
    return MetaComponents(**vars(empty_components(folder.path, dtype)))


def store_in_fp8(transformer: Any) -> None:
    """Replace the linear layers of the blocks that ``quantize_blocks`` would quantize."""
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        for name, module in list(block.named_modules()):
            if is_suited(module):
                parent, _, child = name.rpartition(".")
                setattr(block.get_submodule(parent), child, Fp8Linear(module))


@contextmanager
def on_meta(*, is_attention_fused: bool = True) -> Iterator[None]:
    """Allow models on the meta device to run within the block.

    Args:
        is_attention_fused: if False, attention allocates the matrix of all pairs of tokens, like PyTorch's fallback.
    """
    with ExitStack() as stack:
        stack.enter_context(ReadAsZero())
        if is_attention_fused:
            stack.enter_context(FusedAttention())
        yield


def tensors_of(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yield all parameters and buffers."""
    yield from module.parameters()
    yield from module.buffers()


def num_bytes(*modules: nn.Module) -> int:
    """Return the total size of parameters and buffers."""
    return sum(tensor.nbytes for module in modules for tensor in tensors_of(module))
