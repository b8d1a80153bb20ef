"""Errors as clients get them: a status and an error object."""

import json
from collections.abc import Mapping

from fastapi.responses import JSONResponse
from PIL import Image

from engine.errors import EngineClosed, InputError, cut, shown
from engine.serving.async_engine import DeadlineExceeded, QueueFull
from engine.serving.handle import Cancelled

IMAGES = ("image", "mask", "mask_image", "masks", "sketch", "sketch_mask")  # arguments
RETRY_AFTER = {"Retry-After": "1"}  # seconds


class ServiceError(Exception):
    """An answer that is an error.

    status  of HTTP
    code    for programs: "invalid_value", "queue_full", …
    param   the name of the argument, as the client sent it
    """

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ):
        self.status, self.code, self.message, self.param, self.headers = status, code, message, param, headers
        super().__init__(message)

    def body(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return AsciiJSON(self.body(), self.status, headers=dict(self.headers or {}))


def refused(param: str, problem: str, code: str = "invalid_value", status: int = 400) -> ServiceError:
    """About one argument: `problem` says what is wrong with it and what to do. Cuts a long name of a client."""
    param = cut(param, 200)
    return ServiceError(status, code, f"{param}: {problem}", param)


class AsciiJSON(JSONResponse):
    """JSON in ASCII: clients may send names with lone surrogates, which cannot be encoded as UTF-8."""

    def render(self, content) -> bytes:
        return dumps(content).encode()


def dumps(content) -> str:
    return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def service_error(error: BaseException, names: Mapping[str, str] | None = None) -> ServiceError | None:
    """An error of the engine as clients get it; None for an unexpected one.

    names  the client's names of arguments of `Request`, where they differ; of "deadline", if it has sent one
    """
    match error:
        case ServiceError():
            return error
        case InputError():
            return _input_error(error, names or {})
        case QueueFull():
            return ServiceError(429, "queue_full", str(error), headers=RETRY_AFTER)
        case Cancelled():
            return ServiceError(409, "cancelled", str(error))
        case DeadlineExceeded():
            message = f"{error}; ask for fewer steps or samples"
            return ServiceError(504, "deadline_exceeded", message, (names or {}).get("deadline"))
        case EngineClosed():
            return ServiceError(503, "closed", str(error), headers=RETRY_AFTER)
        case FloatingPointError():
            message = "the result is NaN or infinite; use less guidance, or a service with dtype float32"
            return ServiceError(500, "not_finite", message)
    return None


def _input_error(error: InputError, names: Mapping[str, str]) -> ServiceError:
    param = ", ".join(names.get(name, name) for name in error.argument.split(", "))
    value = "" if isinstance(error.value, Image.Image | bytes) or error.value is None else f"{shown(error.value)} "
    code = "invalid_image" if param.partition("[")[0] in IMAGES else "invalid_value"
    return refused(param, f"{value}{error.problem}; {error.remedy}", code)


def internal_error() -> ServiceError:
    """Without details, which are in the log."""
    return ServiceError(500, "internal_error", "the service failed; its log says why")
