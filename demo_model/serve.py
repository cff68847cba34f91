"""``make serve``: runs both services with the demo model in the foreground, until Ctrl-C."""

import signal
import sys

from demo_model.services import DemoError, running_services


def main() -> int:
    """Serve until Ctrl-C, SIGTERM, or until one of the services exits."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with running_services(log_level="info") as services:
            print(f"the page      {services.generator_url}")
            print(f"text encoder  {services.text_encoder_url}/docs")
            print(f"generator     {services.generator_url}/docs")
            print("Ctrl-C ends both", flush=True)
            services.wait()
    except KeyboardInterrupt:
        return 0
    except DemoError as error:
        print(f"flux2: {error}", file=sys.stderr)
        return 1
    print("flux2: a service has exited, so both are stopped", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
