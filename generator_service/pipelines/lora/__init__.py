"""LoRA and LoKr adapters: files, their configuration, and the layers that apply them."""

from generator_service.pipelines.lora.adapters import Adapter, Adapters, refusing_overflow

__all__ = ["Adapter", "Adapters", "refusing_overflow"]
