"""The callback after each step on a GPU; here only its events are replaced."""

import pytest
import torch

from generator_service.pipelines.callbacks import STEPS_AHEAD, DenoisingCallback


class Event:
    """A CUDA event that records when the host waits for it."""

    num_created = 0
    waited_for: list[int]

    def __init__(self, *, blocking: bool) -> None:
        assert blocking  # the thread sleeps while it waits
        self.number = Event.num_created
        Event.num_created += 1

    def record(self, stream: str) -> None:
        """The event must be recorded on the stream of the model's device, not of the first one."""
        assert stream == "stream of cuda:1"

    def synchronize(self) -> None:
        Event.waited_for.append(self.number)


def test_the_host_is_limited_to_a_few_steps_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """After each step the host waits for the step a few steps back, so the device always has work queued."""
    monkeypatch.setattr(Event, "num_created", 0)
    monkeypatch.setattr(Event, "waited_for", [], raising=False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    clock = DenoisingCallback(10, torch.device("cuda:1"))
    for step in range(9):
        clock(None, step, None, {"latents": torch.zeros(1, 4, 8)})
        assert Event.waited_for == list(range(step + 1 - STEPS_AHEAD))
