"""What happens after each step on a GPU, of which only the events are needed here."""

import pytest
import torch

from generator_service.pipelines.callbacks import STEPS_AHEAD, DenoisingCallback


class Event:
    """Notes when it is waited for."""

    made = 0
    waited_for: list[int]

    def __init__(self, *, blocking: bool) -> None:
        assert blocking  # the thread sleeps while it waits
        self.number = Event.made
        Event.made += 1

    def record(self, stream: str) -> None:
        """On the stream of the model's device, not of the first one."""
        assert stream == "stream of cuda:1"

    def synchronize(self) -> None:
        """Wait."""
        Event.waited_for.append(self.number)


def test_the_host_is_a_few_steps_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """After each step it waits for the step of some steps ago, so the device always has steps to do."""
    monkeypatch.setattr(Event, "made", 0)
    monkeypatch.setattr(Event, "waited_for", [], raising=False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    clock = DenoisingCallback(10, torch.device("cuda:1"))
    for step in range(9):
        clock(None, step, None, {"latents": torch.zeros(1, 4, 8)})
        assert Event.waited_for == list(range(step + 1 - STEPS_AHEAD))
