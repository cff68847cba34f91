"""The generator: prompts in, pictures out, by FLUX.2's transformer under a LeMiCa schedule."""
