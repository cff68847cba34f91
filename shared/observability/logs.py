"""Logging of both services, as text or JSON, with the request id in each line.

Prompts, tokens and images are never logged.
"""

import json
import logging
import time
from contextvars import ContextVar
from typing import Literal

LogFormat = Literal["text", "json"]
request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The id of the current request, or an empty string. The generator forwards it to the text encoder."""


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (UTC), level, logger, message, request_id, and the record's ``fields``."""

    def format(self, record: logging.LogRecord) -> str:
        seconds, milliseconds = divmod(round(1000 * record.created), 1000)
        line = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{milliseconds:03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id.get():
            line["request_id"] = request_id.get()
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line | getattr(record, "fields", {}), ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """Level, logger, message and request id."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(name)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        return f"{line} [{request_id.get()}]" if request_id.get() else line


def set_up_logs(level: str, log_format: LogFormat) -> None:
    """Send all logs of this process to stderr in one format."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger("stamina").setLevel(logging.ERROR)  # its line says neither what is retried nor why; ours does
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every outgoing request at INFO
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # it logs startup and shutdown at INFO
