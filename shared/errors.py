"""The errors that clients can receive. Each class defines its HTTP status and machine-readable code.

Flux2Error                    500 internal_error
├── InvalidRequest            422 invalid_request
├── MalformedBody             400 malformed_body
├── Unauthorized              401 unauthorized
├── CrossSiteRequest          403 cross_site_request
├── RequestTimeout            408 request_timeout
├── PayloadTooLarge           413 payload_too_large
├── UnsupportedMediaType      415 unsupported_media_type
├── UnknownHost               421 unknown_host
├── Busy                      429 busy
├── DeadlineExceeded          504 deadline_exceeded
├── Starting                  503 starting
├── ShuttingDown              503 shutting_down
├── DeviceLost                503 device_lost
├── OutOfMemory               503 oom
└── ModelRefused              (at startup: the model cannot be used)
"""

from typing import ClassVar

SHORT_PAUSE_S = 5.0
"""``Retry-After`` of requests that failed because the service stops."""


class Flux2Error(Exception):
    """Base class of errors that clients may see. ``str(error)`` is safe to show."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    is_worth_retrying: ClassVar[bool] = True
    asks_to_retry: ClassVar[bool] = False
    """Whether clients are asked to retry, which they might not do by default after this status."""

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequest(Flux2Error):
    """A field has an invalid value; ``param`` names the field."""

    status = 422
    code = "invalid_request"
    is_worth_retrying = False


class MalformedBody(Flux2Error):
    """The body is empty, or not what its content type says."""

    status = 400
    code = "malformed_body"
    is_worth_retrying = False


class Unauthorized(Flux2Error):
    """The bearer token is missing or wrong."""

    status = 401
    code = "unauthorized"
    is_worth_retrying = False


class UnsupportedMediaType(Flux2Error):
    """The body has another content type than this route reads."""

    status = 415
    code = "unsupported_media_type"
    is_worth_retrying = False


class CrossSiteRequest(Flux2Error):
    """A browser sent the request for a page of another site, which is not allowed."""

    status = 403
    code = "cross_site_request"
    is_worth_retrying = False


class UnknownHost(Flux2Error):
    """The header ``Host`` names a host that this service is not known as."""

    status = 421
    code = "unknown_host"
    is_worth_retrying = False


class RequestTimeout(Flux2Error):
    """The body of the request arrived too slowly."""

    status = 408
    code = "request_timeout"


class PayloadTooLarge(Flux2Error):
    """The body exceeds the service's limit."""

    status = 413
    code = "payload_too_large"
    is_worth_retrying = False


class Busy(Flux2Error):
    """The queue is full; ``retry_after_s`` says when to retry."""

    status = 429
    code = "busy"


class DeadlineExceeded(Flux2Error):
    """The request's deadline passed before it was finished."""

    status = 504
    code = "deadline_exceeded"
    is_worth_retrying = False


class Starting(Flux2Error):
    """The service has not loaded its model yet; the message says which stage it has reached."""

    status = 503
    code = "starting"


class ShuttingDown(Flux2Error):
    """The service shuts down before the request completed."""

    status = 503
    code = "shutting_down"

    def __init__(self) -> None:
        super().__init__("the service is shutting down", retry_after_s=SHORT_PAUSE_S)


class DeviceLost(Flux2Error):
    """The device has failed and cannot be used by this process again; the process exits to be restarted."""

    status = 503
    code = "device_lost"
    asks_to_retry = True

    def __init__(self) -> None:
        super().__init__("the GPU has failed; the service restarts", retry_after_s=SHORT_PAUSE_S)


class OutOfMemory(Flux2Error):
    """The device has too little memory for the request."""

    status = 503
    code = "oom"
    is_worth_retrying = False


class ModelRefused(Flux2Error):
    """The model is missing, incomplete, unsafe, or not a FLUX.2 model."""

    code = "model_refused"
    is_worth_retrying = False
