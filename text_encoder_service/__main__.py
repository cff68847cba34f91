"""``python -m text_encoder_service``: serve until SIGTERM or Ctrl-C."""

from shared.server import serve
from text_encoder_service.app import create_app
from text_encoder_service.settings import TextEncoderSettings

if __name__ == "__main__":
    serve(TextEncoderSettings, create_app)
