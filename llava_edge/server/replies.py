"""What the child says -> what OpenAI's clients expect: whole answers, events of a stream, lists of models."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Mapping
from typing import Any

from llava_edge.server.problems import Problem

DONE = b"data: [DONE]\n\n"
Event = Mapping[str, Any]  # of the child, see `llava_edge.server.child`


def event(value: Mapping[str, Any]) -> bytes:
    """One server-sent event. ASCII, so that no line separator of Unicode can end it early."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode("ascii") + b"\n\n"


def failure(problem: Problem) -> bytes:
    """The event that ends a stream which cannot go on; no `DONE` follows it."""
    return event(problem.body())


class Reply:
    """The answer to one request, as /v1/chat/completions (`chat`) or /v1/completions gives it."""

    def __init__(self, model: str, chat: bool) -> None:
        self._chat = chat
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": ("chat.completion" if chat else "text_completion"),
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, events: Iterable[Event]) -> dict[str, Any]:
        """All events of an answer -> one object."""
        said = list(events)
        text = "".join(said_now["text"] for said_now in said)
        chances = [chance for said_now in said for chance in said_now["chances"]]
        body = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
        choice = {"index": 0, **body, "logprobs": self._logprobs(chances), "finish_reason": _reason(said[-1])}
        return {**self._head, "choices": [choice], "usage": usage(said[-1]), "llava_edge": details(said[-1])}

    def first(self) -> bytes:
        """What a stream begins with: the role."""
        return self._part({"role": "assistant", "content": ""}) if self._chat else b""

    def piece(self, said: Event) -> bytes:
        """A piece of text, and with the last one why it ended."""
        body = ({"content": said["text"]} if said["text"] else {}) if self._chat else {"text": said["text"]}
        if not said["text"] and not said["chances"] and not said.get("result"):
            return b""
        return self._part(body, _reason(said), self._logprobs(said["chances"]))

    def last(self, said: Event, include_usage: bool) -> bytes:
        """What a stream ends with: usage, if it was asked for, and the mark of a clean end."""
        if not include_usage:
            return DONE
        head = self._streamed_head()
        return event({**head, "choices": [], "usage": usage(said), "llava_edge": details(said)}) + DONE

    def _part(self, body: dict[str, Any], reason: str | None = None, logprobs: object = None) -> bytes:
        delta = {"delta": body} if self._chat else body
        choice = {"index": 0, **delta, "logprobs": logprobs, "finish_reason": reason}
        return event({**self._streamed_head(), "choices": [choice]})

    def _streamed_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk"} if self._chat else self._head

    def _logprobs(self, chances: list[Any]) -> dict[str, Any] | None:
        """`chances` are [token bytes, logprob, [[token bytes, logprob], ...]], bytes as lists of numbers."""
        if not chances:
            return None
        if self._chat:
            content = [
                _chance(*chance[:2]) | {"top_logprobs": [_chance(*top) for top in chance[2]]} for chance in chances
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [_text(chance[0]) for chance in chances],
            "token_logprobs": [chance[1] for chance in chances],
            "top_logprobs": [{_text(top): logprob for top, logprob in chance[2]} for chance in chances],
        }


def usage(said: Event) -> dict[str, Any]:
    """Tokens of prompt and answer; those of images are part of the prompt's."""
    result = said["result"]
    prompt, answer = result["prompt_tokens"], result["completion_tokens"]
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def details(said: Event) -> dict[str, Any]:
    """What OpenAI's format has no place for: milliseconds of each stage, positions of images, cache."""
    result = said["result"]
    return {name: result[name] for name in ("timings", "image_tokens", "cache")}


def models(name: str, created: int) -> dict[str, Any]:
    """The list of models: one."""
    return {"object": "list", "data": [model(name, created)]}


def model(name: str, created: int) -> dict[str, Any]:
    """One model."""
    return {"id": name, "object": "model", "created": created, "owned_by": "llava-edge"}


def _reason(said: Event) -> str | None:
    return said["result"]["finish_reason"] if said.get("result") else None


def _chance(token: list[int], logprob: float) -> dict[str, Any]:
    return {"token": _text(token), "logprob": logprob, "bytes": token}


def _text(token: list[int]) -> str:
    return bytes(token).decode("utf-8", "replace")
