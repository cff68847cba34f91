"""HTTP API of the generator: routes, request bodies, and responses."""
