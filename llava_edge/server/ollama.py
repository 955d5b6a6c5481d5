"""Ollama's API, for programs written for it: its requests are rewritten as OpenAI's, answers become its JSON lines.

The format: https://github.com/ollama/ollama/blob/main/docs/api.md
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from llava_edge.bundle import Manifest
from llava_edge.server import replies, requests
from llava_edge.server.limits import Limits
from llava_edge.server.problems import Problem, bad_request
from llava_edge.server.replies import Event
from llava_edge.server.requests import ModelRequest

VERSION = "0.12.11"  # the first Ollama with all fields known here; clients ask for it before they use newer ones

_NEVER = "2999-12-31T23:59:59Z"

_NO_EFFECT: dict[str, tuple[object, ...]] = {
    "think": (False,),
    "raw": (False,),
    "template": ("",),
    "suffix": ("",),
    "context": ([],),
}


def parse_chat(body: Mapping[str, Any], limits: Limits) -> ModelRequest:
    """Check a request to /api/chat, but for the model. Raises `Problem` (400)."""
    messages = body.get("messages")
    if isinstance(messages, list):
        messages = [_rewrite_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    return requests.parse_messages(_rewrite_options(body), messages, limits, "messages")


def parse_generate(body: Mapping[str, Any], limits: Limits) -> ModelRequest:
    """Check a request to /api/generate, but for the model. Raises `Problem` (400)."""
    for name in ("prompt", "system"):
        if not isinstance(body.get(name) or "", str):
            raise bad_request(f"{name} must be a string.", name)
    message = {"role": "user", "content": body.get("prompt"), "images": body.get("images")}
    messages = [_rewrite_message(message, "images")]
    return requests.parse_messages(_rewrite_options(body), messages, limits, "prompt", system=body.get("system") or "")


def parse_model(body: Mapping[str, Any], model: str) -> str:
    """Check which model a request is for; return its name as the client wrote it. Raises `Problem` (400, 404)."""
    name = body.get("model") or body.get("name")
    requests.check_model({"model": name}, model)
    return name or model


def only_loads(body: Mapping[str, Any]) -> bool:
    """Whether a request has no question: clients send such a one to have the model loaded, which it is."""
    return not (body.get("messages") or body.get("prompt") or body.get("images"))


def _rewrite_options(body: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but the messages. Options that only matter while a model is loaded, like `num_ctx`, are ignored."""
    requests.refuse_unsupported(body, _NO_EFFECT)
    options = body.get("options") or {}
    if not isinstance(options, dict):
        raise bad_request("options must be an object.", "options")
    if options.get("num_predict") == -2:  # to the end of the context, where -1, without a limit, ends too
        options = {**options, "num_predict": -1}
    names = ("tools", "logprobs", "top_logprobs")
    return {
        **options,
        **{name: body[name] for name in names if name in body},
        "response_format": _rewrite_format(body.get("format")),
        "stream": True if body.get("stream") is None else body["stream"],
    }


def _rewrite_format(format_: object) -> dict[str, Any] | None:
    if format_ is None or format_ == "":
        return None
    if format_ == "json":
        return {"type": "json_object"}
    if not isinstance(format_, dict):
        raise bad_request('format must be "json" or a JSON schema.', "format")
    return {"type": "json_schema", "json_schema": {"schema": format_}}


def _rewrite_message(message: object, param: str) -> object:
    """A message whose `images` become parts of its content. Ollama's client leaves out what is empty."""
    if not isinstance(message, dict):
        return message
    images, content = message.get("images") or [], message.get("content") or ""
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise bad_request("images must be a list of strings in base64.", param)
    # In base64; browsers' FileReader makes data: URLs.
    urls = [image if image.startswith("data:") else f"data:;base64,{image}" for image in images]
    parts = [{"type": "image_url", "image_url": url} for url in urls]
    return {"role": message.get("role"), "content": [*parts, {"type": "text", "text": content}] if parts else content}


class Reply:
    """Formats the answer to one request for /api/chat (`chat`) or /api/generate. model: as the client wrote it."""

    media_type = "application/x-ndjson"

    def __init__(self, model: str, chat: bool) -> None:
        self._model = model
        self._chat = chat

    def complete(self, events: Sequence[Event]) -> dict[str, Any]:
        """The response object of an answer that is not streamed."""
        return self._object(*replies.join(events)) | _statistics(events[-1]["result"])

    def loaded(self) -> dict[str, Any]:
        """The response object for a request without a question."""
        return self._object("", []) | {"done": True, "done_reason": "load"}

    def start(self) -> bytes:
        """Nothing: a stream starts with its first text."""
        return b""

    def chunk(self, event: Event) -> bytes:
        """A line of a stream: text. Empty if there is nothing to send."""
        if not event["text"] and not event["chances"]:
            return b""
        return _line(self._object(event["text"], event["chances"]))

    def end(self, event: Event) -> bytes:
        """The last line of a stream: the finish reason, durations and numbers of tokens."""
        return _line(self._object("", []) | _statistics(event["result"]))

    def error(self, problem: Problem) -> bytes:
        """The line that ends a stream with an error."""
        return _line(error(problem))

    def _object(self, text: str, chances: list[Any]) -> dict[str, Any]:
        body = {"message": {"role": "assistant", "content": text}} if self._chat else {"response": text}
        logprobs = {"logprobs": replies.token_logprobs(chances)} if chances else {}
        return {"model": self._model, "created_at": _timestamp(datetime.now(UTC)), **body, **logprobs, "done": False}


def _statistics(result: Mapping[str, Any]) -> dict[str, Any]:
    """Durations are in nanoseconds. The prompt's includes its images."""
    timings = result["timings"]
    prompt_ms = timings["preprocess_ms"] + timings["encode_ms"] + timings["prefill_ms"]
    return {
        "done": True,
        "done_reason": result["finish_reason"],
        "total_duration": _nanoseconds(timings["total_ms"]),
        "load_duration": 0,
        "prompt_eval_count": result["prompt_tokens"],
        "prompt_eval_duration": _nanoseconds(prompt_ms),
        "eval_count": result["completion_tokens"],
        "eval_duration": _nanoseconds(timings["decode_ms"]),
    }


def _nanoseconds(milliseconds: float) -> int:
    return max(1, round(milliseconds * 1e6))  # clients divide by it


def error(problem: Problem) -> dict[str, Any]:
    """The JSON object of an error."""
    return {"error": problem.message}


def model_list(manifest: Manifest, started: float) -> dict[str, Any]:
    """The response to /api/tags, with the only model. started: seconds since 1970."""
    name = f"{manifest.name}:latest"
    model = {
        "name": name,
        "model": name,
        "modified_at": _timestamp(datetime.fromtimestamp(started, UTC)),
        "size": manifest.size,
        "digest": manifest.identity,
        "details": _details(manifest),
    }
    return {"models": [model]}


def loaded_models(manifest: Manifest, started: float, ready: Mapping[str, Any]) -> dict[str, Any]:
    """The response to /api/ps: the only model, which is loaded for ever. ready: the child's first event."""
    (model,) = model_list(manifest, started)["models"]
    on_gpu = not ready.get("device", "cpu").startswith("cpu")
    size_vram, context = model["size"] if on_gpu else 0, ready.get("context", 0)
    return {"models": [model | {"expires_at": _NEVER, "size_vram": size_vram, "context_length": context}]}


def model_details(manifest: Manifest, context: int) -> dict[str, Any]:
    """The response to /api/show. context: length of the KV cache in positions."""
    return {
        "details": _details(manifest),
        "model_info": {
            "general.architecture": "llama",
            "general.basename": manifest.name,
            "llama.context_length": context,
        },
        "capabilities": ["completion", "vision"],
    }


def _details(manifest: Manifest) -> dict[str, Any]:
    """All of Ollama's fields, which are required by many clients' types."""
    return {
        "parent_model": "",
        "format": "gguf",
        "family": "llama",
        "families": ["llama", "clip"],
        "parameter_size": "",  # not known
        "quantization_level": manifest.language.quantization.upper(),
    }


def _timestamp(time: datetime) -> str:
    return time.isoformat().replace("+00:00", "Z")


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode("ascii") + b"\n"
