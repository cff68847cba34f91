"""``python -m text_encoder_service``: serve until SIGTERM or Ctrl-C."""

from flux2_shared.model.compile_cache import replace_unwritable_caches
from flux2_shared.web.server import serve
from text_encoder_service.settings import TextEncoderSettings

if __name__ == "__main__":
    replace_unwritable_caches()
    from text_encoder_service.app import create_app  # may import PyTorch's compiler

    serve(TextEncoderSettings, create_app)
