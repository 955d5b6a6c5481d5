"""What the server accepts at most, in one place. Each protects memory or time from one client."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes, times in seconds."""

    body: int = 20 << 20
    images: int = 8
    pixels: int = 50_000_000  # of all images of a request together
    messages: int = 256
    depth: int = 32  # of JSON
    structure: int = 256 << 10  # of JSON without its texts: bounds how many values there can be
    prompt: int = 1 << 20  # of all texts together
    queue: int = 16  # requests that wait for the model
    requests: int = 64  # requests in work of any kind
    connections: int = 512  # beyond these a connection is closed unanswered
    head: int = 16 << 10  # request line and headers
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    refused_seconds: float = 1.0  # that who may not be here, or is late, gets for what its answer does not need
    queue_seconds: float = 300.0  # behind others, whose answers by a 7B take a minute each
    answer_seconds: float = 600.0
    stall_seconds: float = 30.0  # of a client that does not read
    cancel_seconds: float = 10.0  # that the child gets to leave a request before it is killed
    load_seconds: float = 600.0
