"""Errors in the form of OpenAI's API."""

import re
from typing import Any

import msgspec
from pydantic import ValidationError
from starlette.responses import Response

RETRY_AFTER_S = 1


class ApiError(Exception):
    """What a client gets instead of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        """kind: OpenAI's "type"; param: the field of the call that is wrong."""
        super().__init__(message)
        self.status = status
        self.content = {"message": message, "type": kind, "param": param, "code": code}

    def body(self) -> bytes:
        return msgspec.json.encode({"error": self.content})

    def response(self) -> Response:
        headers = {}
        if self.status in (429, 503):
            headers["Retry-After"] = str(RETRY_AFTER_S)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Response(self.body(), self.status, headers, "application/json")


def invalid_body(error: ValidationError) -> ApiError:
    """Names the first field that is wrong, and what was expected of it."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = [str(part) for part in first["loc"]]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no valid JSON: {first['msg']}")
    if not place:
        return ApiError(400, f"the body must be a JSON object: {first['msg']}")
    param = place[0]
    if first["type"] == "extra_forbidden":
        message = f"{'.'.join(place)} is not supported here; leave it out"
    elif first["type"] == "missing":
        message = f"{param} is missing"
    else:
        message = f"{'.'.join(place)}: {first['msg']}"
    return ApiError(400, message, param=param)


def invalid_value(error: ValueError, fields: Any, prompt_field: str) -> ApiError:
    """Of a setting that the engine cannot follow; its message begins with the field, or not.

    prompt_field: what the prompt was made of, which messages call a prompt in every call.
    """
    message = str(error)
    words = re.findall(r"\w+", message)
    named = next((word for word in words if word == "prompt" or word in fields), None)
    return ApiError(400, message, param=prompt_field if named == "prompt" else named)
