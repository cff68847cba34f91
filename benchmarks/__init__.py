"""Measurements against peers: each prints a card and, last, one JSON line. Not imported by the product."""
