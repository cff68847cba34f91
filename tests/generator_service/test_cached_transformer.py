"""``CachedTransformer``: the assumptions it checks, and how it fails."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import nn

from generator_service.lemica import (
    CachedTransformer,
    FeatureKind,
    Schedule,
    ScheduleMismatch,
    Signature,
    TimeEmbeddings,
    TransformerMismatch,
    check_transformer,
)
from generator_service.lemica.predictor import CachedFeature


class Tiny(nn.Module):
    """A transformer with the same outer modules as FLUX.2's and blocks that are not from diffusers."""

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder = nn.Linear(4, 8)
        self.block = nn.Linear(8, 8)
        self.norm_out = Modulated()
        self.proj_out = nn.Linear(8, 4)
        self.config: dict[str, Any] = {}
        self.dtype = torch.float32
        self.num_block_runs = 0

    def time_guidance_embed(self, timestep: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
        return (timestep + 10 * guidance).view(-1, 1, 1) / 1000

    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, guidance: torch.Tensor, **_rest: Any
    ) -> tuple[torch.Tensor]:
        self.num_block_runs += 1
        hidden = self.x_embedder(hidden_states)
        hidden = hidden + torch.tanh(self.block(hidden))
        return (self.proj_out(self.norm_out(hidden, self.time_guidance_embed(timestep * 1000, guidance * 1000))),)


class Modulated(nn.Module):
    """A norm with a shift."""

    def forward(self, hidden: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(hidden, hidden.shape[-1:]) + temb


def inputs(num_tokens: int = 6) -> dict[str, Any]:
    """The arguments of one forward pass."""
    noise = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, num_tokens, 4, generator=noise),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([4.0]),
        "return_dict": False,
    }


def schedule(num_steps: int, *computed: int) -> Schedule:
    return Schedule("test", num_steps, computed, "test", Signature("test", num_steps))


class Searching(Tiny):
    """Counts the accesses to its dtype, which diffusers determines by searching the parameters."""

    num_searches = 0

    @property
    def dtype(self) -> torch.dtype:
        self.num_searches += 1
        return torch.float32

    @dtype.setter
    def dtype(self, _value: torch.dtype) -> None:
        """Ignore the assignment."""


def test_the_dtype_is_looked_up_once() -> None:
    """The pipeline reads the dtype at each step; the transformer is queried only the first time."""
    transformer = Searching()
    cached = CachedTransformer(transformer, schedule(5, 0), 6)
    assert [cached.dtype for _ in range(5)] == 5 * [torch.float32]
    assert transformer.num_searches == 1


@torch.no_grad()
def test_the_transformer_runs_at_computed_steps_only() -> None:
    """At a reused step no block runs; every step is reported as computed or reused."""
    tiny, steps = Tiny(), []
    cached = CachedTransformer(tiny, schedule(5, 0, 3), 6, lambda *step: steps.append(step))
    for _ in range(5):
        cached(**inputs())
    assert tiny.num_block_runs == 2
    assert steps == [(0, True), (1, False), (2, False), (3, True), (4, False)]


@torch.no_grad()
def test_other_blocks_do_not_matter() -> None:
    """A transformer with other blocks passes the check, and keeps no hooks."""
    tiny = Tiny()
    check_transformer(tiny, inputs())
    assert not tiny.x_embedder._forward_hooks
    assert not tiny.norm_out._forward_pre_hooks


@pytest.mark.parametrize("module", ["x_embedder", "norm_out", "proj_out"])
def test_a_missing_module_is_an_error(module: str) -> None:
    """If diffusers lacks a module that caching needs, the start fails with the module's name."""
    tiny = Tiny()
    delattr(tiny, module)
    with pytest.raises(TransformerMismatch, match=module):
        check_transformer(tiny, inputs())


def test_a_module_that_is_not_called_is_an_error() -> None:
    """If a module has the expected name but is never called, the start fails."""
    tiny = Tiny()
    tiny.norm_out.forward = None  # type: ignore[method-assign, assignment]
    with pytest.raises(TransformerMismatch):
        check_transformer(tiny, inputs())


def test_a_module_with_another_meaning_is_an_error() -> None:
    """If something happens after ``proj_out``, the start fails, because a reused step would skip it."""

    class Changed(Tiny):
        """Doubles its velocity after ``proj_out``."""

        def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
            return (2 * super().forward(*args, **kwargs)[0],)

    with pytest.raises(TransformerMismatch, match="differs"):
        check_transformer(Changed(), inputs())


@torch.no_grad()
def test_a_run_longer_than_its_schedule_is_refused() -> None:
    """A schedule is never stretched to a longer run."""
    cached = CachedTransformer(Tiny(), schedule(1, 0), 6)
    cached(**inputs())
    with pytest.raises(ScheduleMismatch):
        cached(**inputs())


@torch.no_grad()
def test_hooks_are_removed_after_a_failure() -> None:
    """An exception inside the transformer leaves no hooks behind."""
    tiny = Tiny()
    cached = CachedTransformer(tiny, schedule(2, 0), 6)
    with pytest.raises(RuntimeError):
        cached(**{**inputs(), "hidden_states": torch.zeros(1, 6, 5)})
    assert not tiny.x_embedder._forward_hooks
    assert not tiny.norm_out._forward_pre_hooks


@dataclass(frozen=True)
class Recalls:
    """A predictor that reuses the newest feature and records how many were available."""

    name: str = "recalls"
    feature: FeatureKind = "residual"
    num_past: int = 2
    counts: list[int] = field(default_factory=list)

    def predict(self, past: Sequence[CachedFeature], step: int, sigma: float) -> torch.Tensor:
        self.counts.append(len(past))
        return past[-1].value


@torch.no_grad()
def test_only_features_that_the_predictor_uses_are_kept() -> None:
    """Only the features of the last ``num_past`` computed steps stay in memory."""
    predictor = Recalls()
    cached = CachedTransformer(Tiny(), replace(schedule(9, *range(8)), predictor=predictor), 6)
    for _ in range(9):
        cached(**inputs())
    assert predictor.counts == [2]


def test_noise_levels_are_embedded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that share the cache embed each noise level and guidance of a reused step once, with equal results."""
    tiny, cached_embeddings = Tiny(), dict[tuple[float, float, int], torch.Tensor]()
    schedule = Schedule("half", 4, (0, 2), "test", Signature("any", 4))
    embedded: list[float] = []
    embed = Tiny.time_guidance_embed

    def counted(self: Tiny, timestep: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
        embedded.append(float(timestep[0]))
        return embed(self, timestep, guidance)

    def run(
        guidance: float, cached_embeddings: dict[tuple[float, float, int], torch.Tensor] | None
    ) -> list[torch.Tensor]:
        times = None if cached_embeddings is None else TimeEmbeddings(guidance, cached_embeddings)
        cached = CachedTransformer(tiny, schedule, 6, embeddings=times)
        scaled = torch.tensor([guidance])
        levels = (torch.tensor([0.9 - 0.2 * step]) for step in range(4))
        with torch.no_grad():
            return [cached(**inputs() | {"timestep": level, "guidance": scaled})[0] for level in levels]

    plain, plain_other = run(4.0, None), run(2.0, None)
    monkeypatch.setattr(Tiny, "time_guidance_embed", counted)
    assert all(map(torch.equal, run(4.0, cached_embeddings), plain))
    assert len(embedded) == 4  # two computed steps, two reused
    assert all(map(torch.equal, run(4.0, cached_embeddings), plain))
    assert len(embedded) == 4 + 2  # computed steps embed as the library does
    assert all(map(torch.equal, run(2.0, cached_embeddings), plain_other))
