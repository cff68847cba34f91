"""How the demo model was made, from nothing: ``python -m demo_model.train``."""
