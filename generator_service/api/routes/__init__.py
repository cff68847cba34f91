"""The routes of the generator's own API."""
