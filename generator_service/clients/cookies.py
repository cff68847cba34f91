"""Cookies of other services are not kept: one that sets many would make its own requests too large."""

from http.cookiejar import CookieJar, DefaultCookiePolicy


def no_cookies() -> CookieJar:
    """Return a jar that accepts no cookies."""
    return CookieJar(DefaultCookiePolicy(allowed_domains=()))
