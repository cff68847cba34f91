"""Bearer tokens, and whose request it is."""

import hashlib
import secrets
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from flux2_shared.errors import Unauthorized

_bearer = HTTPBearer(auto_error=False)


def require_token(tokens: Sequence[str]) -> Any:
    """Create a dependency that requires one of the bearer ``tokens``, or nothing if there are none."""
    if not tokens:
        return Depends(_bearer)  # which the API's description names in any case

    async def check(
        request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
    ) -> None:
        given = credentials.credentials.encode() if credentials else b""
        # All tokens are compared, in constant time, so that the response time reveals nothing.
        is_known = [secrets.compare_digest(given, token.encode()) for token in tokens]
        if not any(is_known):
            raise Unauthorized("a valid bearer token is required")
        request.state.owner = hashlib.sha256(given).hexdigest()

    return Depends(check)


def owner_of(request: Request) -> str:
    """Return the owner of a request: a hash of its token, or an empty string if no tokens are configured."""
    owner: str = getattr(request.state, "owner", "")
    return owner
