"""The demo model: a tiny trained pipeline of FLUX.2's architecture, with its training and evaluation."""
