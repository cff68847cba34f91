"""Imports the libraries and queries the GPUs in a separate process, since both can crash or hang.

After each step all facts so far are printed as a JSON object on one line. If the process exits prematurely, the last
line shows which step it had reached.
"""

import json
import logging
from importlib import import_module
from types import SimpleNamespace
from typing import Any

NEED_TORCH = {
    "transformers": ("AutoTokenizer", "MistralModel"),
    "diffusers": ("AutoencoderKLFlux2", "Flux2Pipeline", "Flux2Transformer2DModel"),
}
"""Names to import from each library, because these libraries import their modules lazily."""


class Facts:
    """The facts so far, which are printed after each change."""

    def __init__(self) -> None:
        self._facts: dict[str, Any] = {"versions": {}, "errors": {}}

    def begin(self, name: str) -> None:
        """Begin a step; if the process exits during it, this was the last one."""
        self._facts["running"] = name
        self._print()

    def add(self, **facts: Any) -> None:
        self._facts |= facts
        self._print()

    def has(self, library: str) -> bool:
        return library in self._facts["versions"]

    def import_library(self, name: str, wanted: tuple[str, ...]) -> None:
        """Import a library; record its version or the error."""
        self.begin(name)
        try:
            module = import_module(name)
            for attribute in wanted:
                getattr(module, attribute)
            self._facts["versions"][name] = str(module.__version__)
        except Exception as error:  # noqa: BLE001 - a broken library raises anything
            self._facts["errors"][name] = f"{type(error).__name__}: {error}"
        self._print()

    def _print(self) -> None:
        print(json.dumps(self._facts), flush=True)


def ask_torch(facts: Facts) -> int:
    """Record torch's build and the GPUs that it sees; return the number of GPUs."""
    import torch  # noqa: PLC0415 - it may be broken, which the caller has checked

    facts.add(cuda=torch.version.cuda)
    facts.begin("the GPUs")
    try:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if torch.version.cuda is not None and count == 0:
            torch.cuda.init()  # type: ignore[no-untyped-call] # raises an error with the reason
        facts.add(architectures=torch.cuda.get_arch_list(), gpus=[gpu(torch, index) for index in range(count)])
    except Exception as error:  # noqa: BLE001 - the driver's errors
        facts.add(gpu_error=f"{type(error).__name__}: {error}")
        return 0
    return count


def gpu(torch: Any, index: int) -> dict[str, Any]:
    """Describe a GPU. Querying its free memory initializes CUDA on it, which can fail if it is in use."""
    properties = torch.cuda.get_device_properties(index)
    description = {
        "index": index,
        "name": properties.name,
        "uuid": str(getattr(properties, "uuid", "")),
        "capability": [properties.major, properties.minor],
        "total_bytes": properties.total_memory,
    }
    try:
        description["free_bytes"] = torch.cuda.mem_get_info(index)[0]
    except Exception as error:  # noqa: BLE001 - as above
        description["error"] = f"{type(error).__name__}: {error}"
    return description


class Lines(logging.Handler):
    """A log handler that stores messages."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def choose_attention(facts: Facts, question: dict[str, Any]) -> None:
    """Measure which attention kernel the generator's profile ``fast`` would choose."""
    facts.begin("the attention kernels")
    lines = Lines()
    logger = logging.getLogger("flux2")
    logger.addHandler(lines)
    logger.setLevel(logging.DEBUG)
    config = SimpleNamespace(num_attention_heads=question["heads"], attention_head_dim=question["head_dim"])
    try:
        import torch  # noqa: PLC0415 - as above

        from generator_service.pipelines.optimizations.attention import fastest_attention  # noqa: PLC0415 - needs torch

        transformer = SimpleNamespace(config=config, dtype=getattr(torch, question["dtype"]))
        facts.add(attention=fastest_attention(transformer, question["num_tokens"], torch.device(question["device"])))
    except Exception as error:  # noqa: BLE001 - as above
        lines.messages.append(f"{type(error).__name__}: {error}")
    facts.add(attention_lines=lines.messages)


def main(question: str) -> None:
    """Record all facts.

    Args:
        question: an ``Attention`` to choose a kernel for, as JSON, or ``null``.
    """
    facts = Facts()
    facts.import_library("torch", ())
    if facts.has("torch"):
        for name, wanted in NEED_TORCH.items():
            facts.import_library(name, wanted)
        num_gpus = ask_torch(facts)
        attention = json.loads(question)
        if attention is not None and attention["gpu"] < num_gpus and facts.has("diffusers"):
            choose_attention(facts, attention | {"device": f"cuda:{attention['gpu']}"})
    facts.begin("")
