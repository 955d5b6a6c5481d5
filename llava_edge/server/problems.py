"""Errors in OpenAI's format. No message names a file, an address or a line of code."""

from __future__ import annotations

from typing import Any


class Problem(Exception):
    """An error response."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after  # seconds; 0: no such header

    def body(self) -> dict[str, Any]:
        """The JSON object of the error."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def kind(self) -> str:
        """OpenAI's name for errors of this status."""
        names = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 503: "overloaded_error"}
        return names.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    @property
    def headers(self) -> dict[str, str]:
        """Its headers. OpenAI's clients retry a 500 by themselves, which would crash the model's process again, or take
        as long again."""
        wait = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        return wait | ({"X-Should-Retry": "false"} if self.code in ("crash", "timeout") else {})


def bad_request(message: str, param: str | None = None, code: str | None = None) -> Problem:
    """400: the request is invalid or asks for what is not supported."""
    return Problem(400, message, param=param, code=code)


def model_crashed() -> Problem:
    """500: the child died while it worked on the request."""
    return Problem(
        500, "The model's process ended while it worked on this request. It is being restarted.", code="crash"
    )


def server_stopped() -> Problem:
    """503: the server is shutting down."""
    return Problem(503, "The server was stopped while it worked on this request.", code="stopped")


def server_busy(message: str, retry_after: int) -> Problem:
    """503: try again after `retry_after` seconds."""
    return Problem(503, message, code="busy", retry_after=retry_after)
