"""The text encoder: prompts in, FLUX.2's prompt embeddings out. A drop-in for the public remote text encoder."""
