"""The generator service: generates images with FLUX.2's transformer and VAE under a LeMiCa schedule."""
