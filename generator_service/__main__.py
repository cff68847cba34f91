"""``python -m generator_service``: serve until SIGTERM or Ctrl-C."""

from flux2_shared.model.compile_cache import replace_unwritable_caches
from flux2_shared.web.server import serve
from generator_service.settings import GeneratorSettings

if __name__ == "__main__":
    replace_unwritable_caches()
    from generator_service.app import create_app  # imports torch, which reads the cache folders

    serve(GeneratorSettings, create_app)
