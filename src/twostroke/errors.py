"""The error tree. Every error knows its HTTP status, whose fault it is, and whether the same request may be sent again.

Two families: ``RequestError`` ends one request with a reply; ``StartupError`` ends a process before it serves.
"""

from typing import Literal

Fault = Literal["client", "server"]


class TwostrokeError(Exception):
    """Base of all errors that twostroke raises on purpose. ``str(error)`` is safe to show to a client."""

    status = 500
    kind = "server_error"  # the OpenAI error object's "type"
    code: str | None = None  # the OpenAI error object's "code"
    fault: Fault = "server"
    retry_safe = False

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class RequestError(TwostrokeError):
    """One request failed; the process keeps serving."""


class BadRequest(RequestError):
    """The request can never succeed as it stands. ``param`` names the offending field."""

    status = 400
    kind = "invalid_request_error"
    fault: Fault = "client"


class ContextExceeded(BadRequest):
    """Prompt and requested output do not fit the context."""

    code = "context_length_exceeded"


class Unauthorized(RequestError):
    """An internal endpoint was called without the cluster secret."""

    status = 401
    kind = "authentication_error"
    fault: Fault = "client"


class InvalidApiKey(Unauthorized):
    """API keys are in use, and the request carries none of them."""

    kind = "invalid_request_error"  # as OpenAI says it
    code = "invalid_api_key"


class NotFound(RequestError):
    """No such path, model, request or hand-over."""

    status = 404
    kind = "not_found_error"
    fault: Fault = "client"


class ModelNotFound(NotFound):
    """The request names a model that is not served here."""

    code = "model_not_found"


class MethodNotAllowed(RequestError):
    """The path exists, the method does not."""

    status = 405
    kind = "invalid_request_error"
    fault: Fault = "client"


class Conflict(RequestError):
    """The message is for another instance, attempt or state than the present one."""

    status = 409
    kind = "conflict_error"


class TooLarge(RequestError):
    """The body is larger than the server reads."""

    status = 413
    kind = "invalid_request_error"
    fault: Fault = "client"


class TooSlow(RequestError):
    """The body did not arrive in time."""

    status = 408
    kind = "invalid_request_error"
    fault: Fault = "client"


class Overloaded(RequestError):
    """The queue is full. Try again after ``retry_after`` seconds."""

    status = 429
    kind = "overloaded_error"
    retry_safe = True

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NoRoom(Overloaded):
    """The decode worker has no slots for the prompt now, and was told not to let it wait."""

    code = "no_room"


class Unavailable(RequestError):
    """It cannot be served here now (starting, draining, or lost). Try again after ``retry_after`` seconds."""

    status = 503
    kind = "unavailable_error"
    retry_safe = True

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineFailed(RequestError):
    """The model run of this request failed."""

    code = "engine_failed"


class OutOfMemory(RequestError):
    """A step of this request needs more of the device's memory than is left; the other requests go on."""

    status = 503
    code = "out_of_memory"
    retry_safe = True


class HandoverFailed(RequestError):
    """The hand-over ended before every block was verified. The consumer computes what is missing."""

    status = 502
    code = "handover_failed"
    retry_safe = True


class WorkerLost(RequestError):
    """The worker that was to answer cannot be reached, or broke off."""

    status = 502
    code = "worker_lost"
    retry_safe = True


class StartupError(TwostrokeError):
    """The process cannot start; the message says what to change."""

    fault: Fault = "client"


class ModelError(StartupError):
    """The model cannot be loaded: missing, truncated, or not a causal language model."""


class PortInUse(StartupError):
    """The port is taken."""


class DeviceLost(TwostrokeError):
    """The device does not compute any more: nothing that this process holds on it can be used."""


class MemoryTooSmall(StartupError):
    """The KV pool would not hold even one block, or not fit into memory."""
