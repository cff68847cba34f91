"""The demo model: a tiny trained pipeline of FLUX.2's architecture, how it was made, and how it is judged."""
