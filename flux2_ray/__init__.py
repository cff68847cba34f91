"""Both services on many machines, with Ray Serve. Nothing else imports ray."""
