"""The server's limits. Each keeps one client from using up memory or time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes, times in seconds."""

    body: int = 20 << 20
    images: int = 8
    pixels: int = 50_000_000  # all images of a request together
    messages: int = 256
    depth: int = 32  # nesting of JSON
    structure: int = 256 << 10  # of JSON without its strings: bounds the number of values
    prompt: int = 1 << 20  # all texts of a request together
    parallel: int = 8  # requests answered at a time, if the model can
    queue: int = 16  # more of them, waiting for the model
    requests: int = 64  # concurrent requests of any kind
    connections: int = 512  # more are closed without a response
    head: int = 16 << 10  # request line and headers
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    refused_seconds: float = 1.0  # to read the rest of the body of a request refused with 401, 403 or 408
    queue_seconds: float = 300.0  # behind others: one answer of a 7B takes a minute
    answer_seconds: float = 600.0
    stall_seconds: float = 30.0  # until a client that does not read is disconnected
    cancel_seconds: float = 10.0  # for the child to stop working on a request before it is killed
    load_seconds: float = 600.0
