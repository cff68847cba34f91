"""Image generation with diffusers. Only this package imports diffusers."""
