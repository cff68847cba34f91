"""Bearer tokens, and whose request it is."""

import hashlib
import secrets
from collections.abc import Sequence

from fastapi import Depends
from fastapi.security import HTTPBearer
from fastapi.security.utils import get_authorization_scheme_param
from starlette.datastructures import Headers

from flux2_shared.errors import Unauthorized

BEARER = Depends(HTTPBearer(auto_error=False))
"""Names the authentication in the API's description; ``authenticate`` applies it."""


def authenticate(headers: Headers, tokens: Sequence[str]) -> str:
    """Require one of the bearer ``tokens``, or nothing if there are none.

    Returns:
        The owner of the request: a hash of its token, or an empty string if none is required.

    Raises:
        Unauthorized: the request has no token, or another one.
    """
    if not tokens:
        return ""
    scheme, token = get_authorization_scheme_param(headers.get("authorization"))
    given = token.encode() if scheme.lower() == "bearer" else b""
    # All tokens are compared, in constant time, so that the response time reveals nothing.
    is_known = [secrets.compare_digest(given, each.encode()) for each in tokens]
    if not any(is_known):
        raise Unauthorized("a valid bearer token is required")
    return hashlib.sha256(given).hexdigest()
