"""Routes of the generator's native API."""
