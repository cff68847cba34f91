"""``python -m generator_service``: serve until SIGTERM or Ctrl-C."""

from generator_service.app import create_app
from generator_service.settings import GeneratorSettings
from shared.server import serve

if __name__ == "__main__":
    serve(GeneratorSettings, create_app)
