"""Content negotiation: which of several media types a client prefers, by its ``Accept`` header (RFC 9110, 12.5.1)."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fastapi import Request

JSON_MEDIA_TYPE = "application/json"
QUOTED = re.compile(r'"(?:[^"\\]|\\.?)*+"?', re.DOTALL)
"""A quoted parameter value, which may contain separators; an unterminated one extends to the end."""
MEDIA_RANGE = re.compile(r"\*/\*|[\w!#$%&'+.^`|~-]+/(?:\*|[\w!#$%&'+.^`|~-]+)", re.ASCII)
WEIGHT = re.compile(r"\d{0,3}(?:\.\d*)?", re.ASCII)


class MediaRange(NamedTuple):
    """A type, or all types that match it, with the client's weight from 0 to 1."""

    name: str
    weight: float

    def specificity(self, media_type: str) -> int:
        """Return 0 if the range does not include the type, and more the fewer other types it includes."""
        if self.name == media_type:
            return 3
        if self.name == f"{media_type.partition('/')[0]}/*":
            return 2
        return 1 if self.name == "*/*" else 0


def preferred_type(request: Request, offers: Sequence[str]) -> str:
    """Return the media type of ``offers`` that the client prefers; the first one if it accepts none of them.

    Types with equal weight are ranked by how exactly they are named, then by their order in ``offers``. JSON counts as
    matched by a wildcard, because many HTTP clients name it in every request, beside ``*/*``.
    """
    ranges = list(parse_accept(", ".join(request.headers.getlist("accept"))))

    def rank(offer: str) -> tuple[float, int]:
        media_type = offer.partition(";")[0]
        specificity, weight = max(((each.specificity(media_type), each.weight) for each in ranges), default=(0, 0.0))
        return weight if specificity else 0.0, min(specificity, 1) if media_type == JSON_MEDIA_TYPE else specificity

    best = max(offers, key=rank)
    return best if rank(best)[0] > 0 else offers[0]


def parse_accept(header: str) -> Iterator[MediaRange]:
    """Yield the media ranges of an ``Accept`` header; malformed ones are skipped. Parameters are ignored."""
    for element in QUOTED.sub("", header).lower().split(","):
        name, *parameters = (part.strip() for part in element.split(";"))
        weights = [value.strip() for key, _, value in (p.partition("=") for p in parameters) if key.strip() == "q"]
        weight = weights[0] if weights else "1"
        if MEDIA_RANGE.fullmatch(name) and WEIGHT.fullmatch(weight) and weight not in {"", "."}:
            yield MediaRange(name, min(float(weight), 1.0))
