"""Clients of other services. Nothing that they answer is trusted."""
