"""Clients of other services. Their responses are untrusted."""
