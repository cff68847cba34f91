"""Bearer tokens, and whose request it is."""

import hashlib
import secrets

from fastapi import Depends, Request
from fastapi.security import HTTPBearer
from fastapi.security.utils import get_authorization_scheme_param

from flux2_shared.errors import Unauthorized

BEARER = Depends(HTTPBearer(auto_error=False))
"""Names the authentication in the API's description; ``authenticate`` applies it."""


def authenticate(request: Request) -> None:
    """Require one of the app's bearer tokens, ``app.state.tokens``, or nothing if there are none.

    Sets ``request.state.owner`` to a hash of the token, or to an empty string.

    Raises:
        Unauthorized: the request has no token, or another one.
    """
    tokens: tuple[str, ...] = request.app.state.tokens
    request.state.owner = ""
    if not tokens:
        return
    scheme, token = get_authorization_scheme_param(request.headers.get("authorization"))
    given = token.encode() if scheme.lower() == "bearer" else b""
    # All tokens are compared, in constant time, so that the response time reveals nothing.
    is_known = [secrets.compare_digest(given, each.encode()) for each in tokens]
    if not any(is_known):
        raise Unauthorized("a valid bearer token is required")
    request.state.owner = hashlib.sha256(given).hexdigest()
