"""The errors a client can meet. Each class owns its HTTP status and machine-readable code.

Flux2Error                    500 internal_error
├── InvalidRequest            422 invalid_request
├── MalformedBody             400 malformed_body
├── UnsupportedParameter      400 unsupported_parameter
├── Unauthorized              401 unauthorized
├── JobNotFound               404 job_not_found
├── JobNotFinished            409 job_not_finished
├── JobCancelled              409 job_cancelled
├── PayloadTooLarge           413 payload_too_large
├── UnsupportedImageType      415 unsupported_image_type
├── Busy                      429 busy
├── NonFiniteOutput           500 nonfinite_output
├── BadEncoderResponse        502 bad_encoder_response
├── EncoderUnavailable        503 encoder_unavailable
├── EncoderTimeout            504 encoder_timeout
├── DeadlineExceeded          504 deadline_exceeded
├── GeneratorUnavailable      503 generator_unavailable
├── Starting                  503 starting
├── ShuttingDown              503 shutting_down
├── DeviceLost                503 device_lost
├── OutOfMemory               503 oom
└── ModelRefused              (at start: the model folder cannot be used)
"""

from typing import ClassVar

SHORT_PAUSE_S = 5.0
"""After which a request that met a service at its end is worth repeating."""


class Flux2Error(Exception):
    """Something went wrong that the client may know about. ``str(error)`` is safe to show."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    is_worth_retrying: ClassVar[bool] = True
    asks_to_retry: ClassVar[bool] = False
    """Whether clients are asked to repeat the request, which they might not do after this status by themselves."""

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequest(Flux2Error):
    """A field's value cannot be used; ``param`` names the field."""

    status = 422
    code = "invalid_request"
    is_worth_retrying = False


class MalformedBody(Flux2Error):
    """The body is not JSON."""

    status = 400
    code = "malformed_body"
    is_worth_retrying = False


class UnsupportedParameter(Flux2Error):
    """A field of another service's API means something that this one cannot do; ``param`` names it."""

    status = 400
    code = "unsupported_parameter"
    is_worth_retrying = False


class Unauthorized(Flux2Error):
    """The bearer token is missing or wrong."""

    status = 401
    code = "unauthorized"
    is_worth_retrying = False


class JobNotFound(Flux2Error):
    """There is no such job, it was forgotten, or it is somebody else's."""

    status = 404
    code = "job_not_found"
    is_worth_retrying = False


class JobNotFinished(Flux2Error):
    """The job's result is not there yet; ``retry_after_s`` says when it is likely."""

    status = 409
    code = "job_not_finished"


class JobCancelled(Flux2Error):
    """The job was cancelled: it will have no result."""

    status = 409
    code = "job_cancelled"
    is_worth_retrying = False


class PayloadTooLarge(Flux2Error):
    """The body exceeds the service's limit."""

    status = 413
    code = "payload_too_large"
    is_worth_retrying = False


class UnsupportedImageType(Flux2Error):
    """An image is of a kind that is not read; ``param`` names it."""

    status = 415
    code = "unsupported_image_type"
    is_worth_retrying = False


class Busy(Flux2Error):
    """The queue is full; ``retry_after_s`` says when a place is likely."""

    status = 429
    code = "busy"


class NonFiniteOutput(Flux2Error):
    """The model drew something that is no picture: not every value is a finite number."""

    code = "nonfinite_output"
    is_worth_retrying = False


class BadEncoderResponse(Flux2Error):
    """The text encoder answered with something that is not a prompt embedding."""

    status = 502
    code = "bad_encoder_response"


class EncoderUnavailable(Flux2Error):
    """The text encoder cannot be reached or says that it is overloaded."""

    status = 503
    code = "encoder_unavailable"


class EncoderTimeout(Flux2Error):
    """The text encoder did not answer in time."""

    status = 504
    code = "encoder_timeout"


class BadUpsamplerResponse(Flux2Error):
    """The prompt upsampler answered with something that is no prompt."""

    status = 502
    code = "bad_upsampler_response"


class UpsamplerUnavailable(Flux2Error):
    """The prompt upsampler cannot be reached, says that it is overloaded, or takes too long."""

    status = 503
    code = "upsampler_unavailable"


class GeneratorUnavailable(Flux2Error):
    """Of many generators none could finish the picture."""

    status = 503
    code = "generator_unavailable"


class DeadlineExceeded(Flux2Error):
    """The request waited longer than it allowed; the device never saw it."""

    status = 504
    code = "deadline_exceeded"
    is_worth_retrying = False


class Starting(Flux2Error):
    """The service has not loaded its model yet; the message says how far it is."""

    status = 503
    code = "starting"


class ShuttingDown(Flux2Error):
    """The service ends before the request could be served."""

    status = 503
    code = "shutting_down"

    def __init__(self) -> None:
        super().__init__("the service is shutting down", retry_after_s=SHORT_PAUSE_S)


class DeviceLost(Flux2Error):
    """The device has failed for good: this process can compute nothing more, and ends so that a new one starts."""

    status = 503
    code = "device_lost"
    asks_to_retry = True

    def __init__(self) -> None:
        super().__init__("the GPU has failed; the service restarts", retry_after_s=SHORT_PAUSE_S)


class OutOfMemory(Flux2Error):
    """The device has too little memory for this request."""

    status = 503
    code = "oom"
    is_worth_retrying = False


class ModelRefused(Flux2Error):
    """The model folder is incomplete, unsafe, or not of FLUX.2's architecture."""

    code = "model_refused"
    is_worth_retrying = False
