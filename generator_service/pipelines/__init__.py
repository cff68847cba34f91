"""The models that draw. The only package that imports diffusers."""
