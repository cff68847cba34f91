"""Both services on several machines with Ray Serve. Only this package imports ray."""
