"""Training of the demo model from scratch: ``python -m demo_model.train``."""
