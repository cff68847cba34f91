"""The errors that only clients of the generator can receive.

Flux2Error
├── UnsupportedParameter      400 unsupported_parameter
├── JobNotFound               404 job_not_found
├── JobNotFinished            409 job_not_finished
├── JobCancelled              409 job_cancelled
├── UnsupportedImageType      415 unsupported_image_type
├── NonFiniteOutput           500 nonfinite_output
├── BadEncoderResponse        502 bad_encoder_response
├── BadUpsamplerResponse      502 bad_upsampler_response
├── EncoderUnavailable        503 encoder_unavailable
├── EncoderMismatch           503 encoder_mismatch
├── GeneratorUnavailable      503 generator_unavailable
├── UpsamplerUnavailable      503 upsampler_unavailable
└── EncoderTimeout            504 encoder_timeout
"""

from flux2_shared.errors import Flux2Error


class UnsupportedParameter(Flux2Error):
    """A field of a compatible API asks for something that this service does not support; ``param`` names it."""

    status = 400
    code = "unsupported_parameter"
    is_worth_retrying = False


class JobNotFound(Flux2Error):
    """The job does not exist, has expired, or belongs to another key."""

    status = 404
    code = "job_not_found"
    is_worth_retrying = False


class JobNotFinished(Flux2Error):
    """The job has no result yet; ``retry_after_s`` says when to retry."""

    status = 409
    code = "job_not_finished"


class JobCancelled(Flux2Error):
    """The job was cancelled and has no result."""

    status = 409
    code = "job_cancelled"
    is_worth_retrying = False


class UnsupportedImageType(Flux2Error):
    """An input image has an unsupported format; ``param`` names it."""

    status = 415
    code = "unsupported_image_type"
    is_worth_retrying = False


class NonFiniteOutput(Flux2Error):
    """The model's output is infinite or NaN."""

    code = "nonfinite_output"
    is_worth_retrying = False


class BadEncoderResponse(Flux2Error):
    """The text encoder's response is not a prompt embedding."""

    status = 502
    code = "bad_encoder_response"


class EncoderUnavailable(Flux2Error):
    """The text encoder cannot be reached or is overloaded."""

    status = 503
    code = "encoder_unavailable"


class EncoderMismatch(Flux2Error):
    """The text encoder serves another model or revision than the generator."""

    status = 503
    code = "encoder_mismatch"


class EncoderTimeout(Flux2Error):
    """The text encoder did not respond in time."""

    status = 504
    code = "encoder_timeout"


class BadUpsamplerResponse(Flux2Error):
    """The prompt upsampler's response is not a prompt."""

    status = 502
    code = "bad_upsampler_response"


class UpsamplerUnavailable(Flux2Error):
    """The prompt upsampler cannot be reached, is overloaded, or did not respond in time."""

    status = 503
    code = "upsampler_unavailable"


class GeneratorUnavailable(Flux2Error):
    """No generator of a fleet could finish the request."""

    status = 503
    code = "generator_unavailable"
