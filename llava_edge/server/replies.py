"""Events of the child -> OpenAI responses: complete answers, streams of events, lists of models."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from llava_edge.server.problems import Problem

DONE = b"data: [DONE]\n\n"
Event = Mapping[str, Any]  # from the child, see `llava_edge.server.child`


def sse_event(value: Mapping[str, Any]) -> bytes:
    """One server-sent event, in ASCII, so that no Unicode line separator can end it early."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode("ascii") + b"\n\n"


class Reply:
    """Formats the answer to one request for /v1/chat/completions (`chat`) or /v1/completions."""

    media_type = "text/event-stream"

    def __init__(self, model: str, chat: bool, include_usage: bool) -> None:
        self._chat = chat
        self._include_usage = include_usage
        self._envelope = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": ("chat.completion" if chat else "text_completion"),
            "created": int(time.time()),
            "model": model,
        }

    def complete(self, events: Sequence[Event]) -> dict[str, Any]:
        """The response object of an answer that is not streamed."""
        last = events[-1]
        text, chances = join(events)
        body = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
        choice = {"index": 0, **body, "logprobs": self._logprobs(chances), "finish_reason": _finish_reason(last)}
        return {**self._envelope, "choices": [choice], "usage": usage(last), "llava_edge": details(last)}

    def start(self) -> bytes:
        """The first event of a stream: the role."""
        return self._choice_event({"role": "assistant", "content": ""}) if self._chat else b""

    def chunk(self, event: Event) -> bytes:
        """An event of a stream: text, and in the last one the finish reason. Empty if there is nothing to send."""
        body = ({"content": event["text"]} if event["text"] else {}) if self._chat else {"text": event["text"]}
        if not event["text"] and not event["chances"] and not event.get("result"):
            return b""
        return self._choice_event(body, _finish_reason(event), self._logprobs(event["chances"]))

    def end(self, event: Event) -> bytes:
        """The end of a stream: usage, if requested, and `DONE`."""
        if not self._include_usage:
            return DONE
        envelope = self._stream_envelope()
        return sse_event({**envelope, "choices": [], "usage": usage(event), "llava_edge": details(event)}) + DONE

    def error(self, problem: Problem) -> bytes:
        """The event that ends a stream with an error; no `DONE` follows it."""
        return sse_event(problem.body())

    def _choice_event(self, body: dict[str, Any], reason: str | None = None, logprobs: object = None) -> bytes:
        delta = {"delta": body} if self._chat else body
        choice = {"index": 0, **delta, "logprobs": logprobs, "finish_reason": reason}
        return sse_event({**self._stream_envelope(), "choices": [choice]})

    def _stream_envelope(self) -> dict[str, Any]:
        return {**self._envelope, "object": "chat.completion.chunk"} if self._chat else self._envelope

    def _logprobs(self, chances: list[Any]) -> dict[str, Any] | None:
        if not chances:
            return None
        if self._chat:
            return {"content": token_logprobs(chances), "refusal": None}
        return {
            "tokens": [_decode(chance[0]) for chance in chances],
            "token_logprobs": [chance[1] for chance in chances],
            "top_logprobs": [{_decode(top): logprob for top, logprob in chance[2]} for chance in chances],
        }


def join(events: Sequence[Event]) -> tuple[str, list[Any]]:
    """The text of all events, and the chances of its tokens (see `token_logprobs`)."""
    return "".join(event["text"] for event in events), [chance for event in events for chance in event["chances"]]


def token_logprobs(chances: Sequence[Any]) -> list[dict[str, Any]]:
    """`chances` are [token bytes, logprob, [[token bytes, logprob], ...]], bytes as lists of numbers."""
    return [
        _token_logprob(token, logprob) | {"top_logprobs": [_token_logprob(*pair) for pair in top]}
        for token, logprob, top in chances
    ]


def usage(event: Event) -> dict[str, Any]:
    """Token counts; the prompt's includes image tokens."""
    result = event["result"]
    prompt, answer = result["prompt_tokens"], result["completion_tokens"]
    counts = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
    return counts | {"prompt_tokens_details": {"cached_tokens": result["cached_tokens"]}}


def details(event: Event) -> dict[str, Any]:
    """Not in OpenAI's format: milliseconds of each stage, number of image tokens, cache status."""
    result = event["result"]
    return {name: result[name] for name in ("timings", "image_tokens", "cache")}


def model_list(name: str, created: int) -> dict[str, Any]:
    """The list of models, which has one."""
    return {"object": "list", "data": [model(name, created)]}


def model(name: str, created: int) -> dict[str, Any]:
    """A model object."""
    return {"id": name, "object": "model", "created": created, "owned_by": "llava-edge"}


def _finish_reason(event: Event) -> str | None:
    return event["result"]["finish_reason"] if event.get("result") else None


def _token_logprob(token: list[int], logprob: float) -> dict[str, Any]:
    return {"token": _decode(token), "logprob": logprob, "bytes": token}


def _decode(token: list[int]) -> str:
    return bytes(token).decode("utf-8", "replace")
