"""The text encoder service: encodes prompts for FLUX.2. Compatible with the public remote text encoder."""
