"""``flux2 doctor``: checks whether the services can run on this host, without loading a model."""
