"""Decodes the base64 of text fields. The text is untrusted."""

import base64
import string
from urllib.parse import unquote_to_bytes

TO_STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")
"""From the URL-safe alphabet (RFC 4648, section 5)."""
WHITESPACE = string.whitespace.encode()


def decode_base64(text: str) -> bytes:
    """Decode base64, or a data URI with base64 (RFC 2397).

    Both alphabets are accepted, padding may be missing, and whitespace such as MIME's line breaks is ignored. A data
    URI may have any media type and parameters.

    Raises:
        ValueError: the text is something else.
    """
    if text.lstrip()[:5].lower() == "data:":
        header, _, payload = text.partition(",")
        if header.rpartition(";")[2].strip().lower() != "base64":
            raise ValueError("a data URI without base64")
        encoded = unquote_to_bytes(payload)
    else:
        encoded = text.encode()
    encoded = encoded.translate(TO_STANDARD_ALPHABET, WHITESPACE)
    return base64.b64decode(encoded + b"=" * (-len(encoded) % 4), validate=True)
