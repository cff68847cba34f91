"""Logs of both services: text for people or JSON for programs, each line with the id of the request it belongs to.

Prompts, tokens and pictures are never logged.
"""

import json
import logging
import time
from contextvars import ContextVar
from typing import Literal

LogFormat = Literal["text", "json"]
request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Of the request that is being served; empty outside of one. The generator sends it on to the text encoder."""


class JsonFormatter(logging.Formatter):
    """One JSON object on each line: time (UTC), level, logger, message, request_id, and the record's ``fields``."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        seconds, milliseconds = divmod(round(1000 * record.created), 1000)
        told = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{milliseconds:03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id.get():
            told["request_id"] = request_id.get()
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told | getattr(record, "fields", {}), ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """Level, logger and message, then the request's id."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(name)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = super().format(record)
        return f"{line} [{request_id.get()}]" if request_id.get() else line


def set_up_logs(level: str, log_format: LogFormat) -> None:
    """Send this process's logs to the standard error stream in one form."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every request of ours
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # it logs its own start and end
