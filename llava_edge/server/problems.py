"""Errors as OpenAI's clients know them. No text here names a file, an address or a line of code."""

from __future__ import annotations

from typing import Any


class Problem(Exception):
    """What a client is told instead of an answer."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after  # seconds; 0: not said

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
        """What goes with it. OpenAI's clients repeat by themselves what failed; not what ended the model's process."""
        wait = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        return wait | ({"X-Should-Retry": "false"} if self.code == "crash" else {})


def bad(message: str, param: str | None = None, code: str | None = None) -> Problem:
    """The request cannot be understood or kept to."""
    return Problem(400, message, param=param, code=code)


def crashed() -> Problem:
    """The child died with the request."""
    return Problem(
        500, "The model's process ended while it worked on this request. It is being restarted.", code="crash"
    )


def stopped() -> Problem:
    """The server ends."""
    return Problem(503, "The server was stopped while it worked on this request.", code="stopped")


def busy(message: str, retry_after: int) -> Problem:
    """Not now."""
    return Problem(503, message, code="busy", retry_after=retry_after)
