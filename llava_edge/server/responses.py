"""OpenAI's newer API, /v1/responses: its requests are rewritten as those of the older one; answers become its objects.

Nothing is stored, so a conversation is sent whole each time. The format: https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from llava_edge.server import replies, requests
from llava_edge.server.limits import Limits
from llava_edge.server.problems import Problem, bad_request
from llava_edge.server.replies import Event
from llava_edge.server.requests import ModelRequest

_NO_EFFECT: dict[str, tuple[object, ...]] = {
    "background": (False,),
    "previous_response_id": ("",),
    "conversation": (),
    "prompt": (),
}
_LOGPROBS = "message.output_text.logprobs"  # in `include`
# Types of the parts of a message: theirs, the older API's, and the field that holds the content in theirs.
_PARTS = {
    "input_text": ("text", "text"),
    "output_text": ("text", "text"),
    "refusal": ("refusal", "refusal"),
    "input_image": ("image_url", "image_url"),
}


def parse(body: Mapping[str, Any], model: str, limits: Limits) -> ModelRequest:
    """Check a request. Raises `Problem` (400, 404)."""
    requests.check_model(body, model)
    requests.refuse_unsupported(body, _NO_EFFECT)
    instructions = body.get("instructions") or ""
    if not isinstance(instructions, str):
        raise bad_request("instructions must be a string.", "instructions")
    items = body.get("input")
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    if isinstance(items, list):
        items = [_rewrite_item(item, f"input[{i}]") for i, item in enumerate(items)]
    include = body.get("include") or []
    if not isinstance(include, list):
        raise bad_request("include must be a list.", "include")
    if body.get("response_format") is not None:
        raise bad_request("response_format is called text.format in this API.", "response_format")
    text = body.get("text") or {}
    if not isinstance(text, dict):
        raise bad_request("text must be an object.", "text")
    if len(json.dumps([body.get("metadata"), text])) > limits.prompt:  # a stream repeats them three times
        raise bad_request(f"metadata and text must have at most {limits.prompt} bytes together.", "metadata")
    rewritten = {
        **body,
        "response_format": _rewrite_format(text.get("format")),
        "verbosity": text.get("verbosity"),
        "logprobs": _LOGPROBS in include or bool(body.get("top_logprobs")),
    }
    try:
        return requests.parse_messages(rewritten, items, limits, "input", system=instructions)
    except Problem as problem:
        if problem.param == "response_format":  # the older API's name
            problem.param = "text.format"
        raise


def _rewrite_format(format_: object) -> object:
    """The name and the schema are in an object of their own in the older API."""
    kind = format_.get("type") if isinstance(format_, dict) else None
    if isinstance(format_, dict) and kind == "json_schema" and "schema" in format_:
        return {"type": kind, "json_schema": format_}
    if format_ is None or kind in ("text", "json_object"):
        return format_
    raise bad_request("text.format must have the type text, json_object, or json_schema and a schema.", "text.format")


def _rewrite_item(item: object, param: str) -> object:
    if not isinstance(item, dict):
        return item
    if item.get("type") == "item_reference":  # in place of an answer: the AI SDK's default
        raise bad_request("Nothing is stored here; set the client's option store to false.", f"{param}.type")
    if item.get("type") not in (None, "message"):
        raise bad_request("The input may consist of messages only.", f"{param}.type")
    content = item.get("content")
    if isinstance(content, list):
        content = [_rewrite_part(part, f"{param}.content[{i}]") for i, part in enumerate(content)]
    return {"role": item.get("role"), "content": content}


def _rewrite_part(part: object, param: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    name, field = _PARTS.get(str(kind), ("", ""))
    if not isinstance(part, dict) or not isinstance(part.get(field), str):
        raise bad_request(
            "A part of a message must be input_text or output_text with a text, or input_image with an image_url.",
            param,
        )
    return {"type": name, name: part[field]}


class Reply:
    """Formats the answer to one request. body: the request, as checked."""

    media_type = "text/event-stream"

    def __init__(self, model: str, body: Mapping[str, Any], request: ModelRequest) -> None:
        self._item_id = f"msg_{secrets.token_hex(12)}"
        self._where = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        self._sequence = 0
        self._events: list[Event] = []
        self._about: dict[str, Any] = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "instructions": body.get("instructions"),
            "max_output_tokens": request.options.max_tokens,
            "metadata": body.get("metadata") or {},
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": request.options.temperature,
            "text": body.get("text") or {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": request.options.top_p,
            "truncation": "disabled",
        }

    def complete(self, events: Sequence[Event]) -> dict[str, Any]:
        """The response object of an answer that is not streamed."""
        self._events = list(events)
        return self._response(events[-1], self._item(_status(events[-1])))

    def start(self) -> bytes:
        """The events before the first text."""
        begun = self._about | {"status": "in_progress", "output": [], "error": None, "incomplete_details": None}
        events = self._event("response.created", response=begun), self._event("response.in_progress", response=begun)
        item = self._item("in_progress") | {"content": []}
        added = self._event("response.output_item.added", output_index=0, item=item)
        return b"".join(events) + added + self._event("response.content_part.added", **self._where, part=self._part())

    def chunk(self, event: Event) -> bytes:
        """An event of a stream: text. Empty if there is nothing to send."""
        self._events.append(event)
        if not event["text"] and not event["chances"]:
            return b""
        logprobs = replies.token_logprobs(event["chances"])
        return self._event("response.output_text.delta", **self._where, delta=event["text"], logprobs=logprobs)

    def end(self, event: Event) -> bytes:
        """The events after the last text, which repeat it whole."""
        status = _status(event)
        item = self._item(status)
        (part,) = item["content"]
        done = {"text": part["text"], "logprobs": part["logprobs"]}
        return (
            self._event("response.output_text.done", **self._where, **done)
            + self._event("response.content_part.done", **self._where, part=part)
            + self._event("response.output_item.done", output_index=0, item=item)
            + self._event(f"response.{status}", response=self._response(event, item))
        )

    def error(self, problem: Problem) -> bytes:
        """The event that ends a stream with an error: as documented, and with `error`, which clients raise."""
        about = {"code": problem.code or problem.kind, "message": problem.message, "param": problem.param}
        return self._event("error", **about, **problem.body())

    def _response(self, last: Event, item: dict[str, Any]) -> dict[str, Any]:
        usage = replies.usage(last)
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        written = usage["prompt_tokens"] - cached
        return {
            **self._about,
            "status": item["status"],
            "completed_at": int(time.time()),
            "error": None,
            "incomplete_details": None if item["status"] == "completed" else {"reason": "max_output_tokens"},
            "output": [item],
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": written},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
            "llava_edge": replies.details(last),
        }

    def _item(self, status: str) -> dict[str, Any]:
        """The only output: a message."""
        parts = [self._part()]
        return {"type": "message", "id": self._item_id, "status": status, "role": "assistant", "content": parts}

    def _part(self) -> dict[str, Any]:
        """The only part of the message: what was answered so far."""
        text, chances = replies.join(self._events)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": replies.token_logprobs(chances)}

    def _event(self, kind: str, **fields: Any) -> bytes:
        value = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return f"event: {kind}\n".encode() + replies.sse_event(value)


def _status(last: Event) -> str:
    return "completed" if last["result"]["finish_reason"] == "stop" else "incomplete"
