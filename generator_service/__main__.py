"""``python -m generator_service``: serve until SIGTERM or Ctrl-C."""

from generator_service.settings import GeneratorSettings
from shared.compile_cache import replace_unwritable_caches
from shared.server import serve

if __name__ == "__main__":
    replace_unwritable_caches()
    from generator_service.app import create_app  # what it imports may import PyTorch's compiler

    serve(GeneratorSettings, create_app)
