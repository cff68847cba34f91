"""Content negotiation: which of several media types a client prefers, by its ``Accept`` header (RFC 9110, 12.5.1)."""

import re
from collections.abc import Sequence

from fastapi import Request

JSON_MEDIA_TYPE = "application/json"
QUOTED = re.compile(r'"(?:[^"\\]|\\.?)*+"?', re.DOTALL)
"""A quoted parameter value, which may contain separators; an unterminated one extends to the end."""
MEDIA_RANGE = re.compile(r"\*/\*|[\w!#$%&'+.^`|~-]+/(?:\*|[\w!#$%&'+.^`|~-]+)", re.ASCII)
WEIGHT = re.compile(r"\d{0,3}(?:\.\d*)?", re.ASCII)


def preferred_type(request: Request, offers: Sequence[str]) -> str:
    """Return the media type of ``offers`` that the client prefers; the first one if it accepts none of them.

    Types with equal weight are ranked by how exactly they are named, then by their order in ``offers``. JSON counts as
    matched by a wildcard, because many HTTP clients name it in every request, beside ``*/*``.
    """
    header = ", ".join(request.headers.getlist("accept"))
    if header in ("", "*/*"):  # most clients
        return offers[0]
    weights = parse_accept(header)
    best, best_rank = offers[0], (0.0, 2)  # of weight 0, and as specific as can be
    for offer in offers:
        media_type = offer.partition(";")[0]
        rank = 0.0, 0
        for specificity, name in enumerate(("*/*", f"{media_type.partition('/')[0]}/*", media_type)):
            if name in weights:  # the last one, which is the most specific, decides
                rank = weights[name], 0 if media_type == JSON_MEDIA_TYPE else specificity
        if rank > best_rank:
            best, best_rank = offer, rank
    return best


def parse_accept(header: str) -> dict[str, float]:
    """Return the weight, from 0 to 1, of each media range of an ``Accept`` header.

    Malformed ranges are skipped, and parameters ignored. Of a repeated range the largest weight counts.
    """
    weight_of: dict[str, float] = {}
    for element in QUOTED.sub("", header).lower().split(","):
        name, *parameters = (part.strip() for part in element.split(";"))
        weights = [value.strip() for key, _, value in (p.partition("=") for p in parameters) if key.strip() == "q"]
        weight = weights[0] if weights else "1"
        if MEDIA_RANGE.fullmatch(name) and WEIGHT.fullmatch(weight) and weight not in {"", "."}:
            weight_of[name] = max(weight_of.get(name, 0.0), min(float(weight), 1.0))
    return weight_of
