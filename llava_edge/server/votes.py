"""The log of votes: upvotes, downvotes and flags in a local file, in the format of LLaVA's demo. Off by default.

One JSON object per line: {tstamp, type, model, state, ip}; `state` is the conversation as llava/conversation.py dumps
it. Clients cannot choose the file, and images are not logged.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_edge.server.problems import Problem, bad_request
from llava_edge.templates import Template

VOTE_TYPES = ("upvote", "downvote", "flag")
MAX_BYTES = 64 << 20
_ROLES = {
    "chatml": ("<|im_start|>user\n", "<|im_start|>assistant\n"),
    "single": ("Human", "Assistant"),
    "plain": ("", ""),
}


class VoteLog:
    """The log at `path`, used from the event loop only. Off until `enabled` is set. Without a path it has no room."""

    def __init__(self, path: Path | None, model: str, layout: Template) -> None:
        self.path = path
        self.enabled = False
        self._model = model
        self._layout = layout

    def add(self, body: Mapping[str, Any], address: str) -> None:
        """Append {"type", "messages": [[role, text], ...]}. Raises `Problem` if malformed, off or full."""
        if not self.enabled:
            raise Problem(403, "The log is off.")
        vote_type, messages = body.get("type"), body.get("messages")
        if vote_type not in VOTE_TYPES:
            raise bad_request(f"type must be one of {', '.join(VOTE_TYPES)}.", "type")
        record = {
            "tstamp": round(time.time(), 4),
            "type": vote_type,
            "model": self._model,
            "state": self._state(messages),
            "ip": address,
        }
        line = json.dumps(record).encode("ascii") + b"\n"
        if self.path is None:
            raise Problem(507, "The log cannot be written: the server has no home folder; set LLAVA_EDGE_HOME.")
        if self.size() + len(line) > MAX_BYTES:
            raise Problem(507, "The log is full. Export and delete it.")
        with _refusing("written"):
            _append(self.path, line)

    def read(self) -> bytes:
        """The whole file. Raises `Problem`, as `delete` and `size` do, if the system refuses."""
        with _refusing("read"):
            return self.path.read_bytes() if self.path and self.path.exists() else b""

    def delete(self) -> None:
        """Remove the file."""
        with _refusing("deleted"):
            if self.path:
                self.path.unlink(missing_ok=True)

    def size(self) -> int:
        """Size of the file in bytes."""
        with _refusing("read"):
            return self.path.stat().st_size if self.path and self.path.exists() else 0

    def _state(self, messages: object) -> dict[str, Any]:
        roles = _ROLES.get(self._layout.style, ("USER", "ASSISTANT"))
        if not isinstance(messages, list) or not 1 <= len(messages) <= 256:
            raise bad_request("messages must be a list of [role, text].", "messages")
        turns = []
        for turn in messages:
            if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(part, str) for part in turn)):
                raise bad_request("messages must be a list of [role, text].", "messages")
            if turn[0] not in ("user", "assistant"):
                raise bad_request("A role must be user or assistant.", "messages")
            turns.append([roles[turn[0] == "assistant"], turn[1]])
        separators = {"two": (" ", "</s>"), "llama_2": ("<s>", "</s>")}.get(
            self._layout.style, (self._layout.end, None)
        )
        return {
            "system": self._layout.system,
            "roles": list(roles),
            "messages": turns,
            "offset": 0,
            "sep": separators[0],
            "sep2": separators[1],
        }


def _append(path: Path, line: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab") as file:
            file.write(line)
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, size)  # or the next line would continue the part that a full disk took
        raise


@contextlib.contextmanager
def _refusing(done: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Problem(507, f"The log cannot be {done}: {error.strerror}.") from error
