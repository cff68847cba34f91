"""``python -m text_encoder_service``: serve until SIGTERM or Ctrl-C."""

from fastapi import FastAPI

from flux2_shared.model.compile_cache import replace_unwritable_caches
from flux2_shared.web.server import serve
from text_encoder_service.settings import TextEncoderSettings


def create_app(settings: TextEncoderSettings) -> FastAPI:
    """Create the app. Its imports take seconds, so invalid settings and a port in use are reported before them."""
    replace_unwritable_caches()  # before torch is imported, which reads the cache folders
    from text_encoder_service import app  # noqa: PLC0415

    return app.create_app(settings)


if __name__ == "__main__":
    serve(TextEncoderSettings, create_app)
