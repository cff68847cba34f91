"""LoRA and LoKr adapters: files, their configuration, and the layers that apply them."""

from generator_service.pipelines.lora.adapters import Adapter, Adapters

__all__ = ["Adapter", "Adapters"]
