"""``flux2 doctor``: what this host has and lacks for the services, without loading a model."""
