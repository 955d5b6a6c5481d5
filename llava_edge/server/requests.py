"""OpenAI requests -> requests to the model. Every value is checked here; nothing else is passed on.

Fields that would change the answer but are not supported are refused; unknown fields are ignored.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from llava_edge.errors import OptionError, UsageError
from llava_edge.json_schema.grammar import from_schema
from llava_edge.options import MAX_TOKENS, Options
from llava_edge.prompt import Message, Role
from llava_edge.server import data_url
from llava_edge.server.limits import Limits
from llava_edge.server.problems import Problem, bad_request

_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

# Unsupported fields that would change the answer, with the values that do not: OpenAI's fields, then those added by
# llama.cpp's server and vLLM. Fields that only matter in combination with one of these are not listed.
_NO_EFFECT: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logit_bias": ({}, []),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),  # without tools
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "echo": (False,),
    "suffix": ("",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "n_cmpl": (1,),
    "n_probs": (0,),
    "n_indent": (0,),
    "min_keep": (0,),
    "t_max_predict_ms": (-1, 0),
    "ignore_eos": (False,),
    "repeat_last_n": (64,),
    "typical_p": (1,),
    "top_n_sigma": (-1, 0),
    "xtc_probability": (0,),
    "dynatemp_range": (0,),
    "dry_multiplier": (0,),
    "mirostat": (0,),
    "adaptive_target": (-1,),
    "samplers": (),
    "lora": ([],),
    "chat_template": ("",),
    "image_data": ([],),
    "images": ([],),
    # Not passed to llama.cpp: it logs a grammar it cannot parse, and never returns from some recursive ones.
    "grammar": ("",),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "truncate_prompt_tokens": (-1,),
    "repetition_detection": (),
    "watermarking": (False,),
    "documents": ([],),
    "mm_processor_kwargs": ({},),
    "vllm_xargs": ({},),
    "structured_outputs": ({},),
    "guided_json": (),
    "guided_choice": ([],),
    "guided_regex": ("",),
    "guided_grammar": ("",),
}
# The same where the last message is the assistant's, which the answer continues.
_NO_EFFECT_IF_CONTINUED: dict[str, tuple[object, ...]] = {
    "add_generation_prompt": (True, False),
    "continue_final_message": (True,),
}
# Fields without effect if the second field is "none".
_TOOL_CHOICE = {"tools": "tool_choice", "functions": "function_call"}
_GRAMMAR_FIELDS = ("grammar", "structured_outputs", "guided_json", "guided_choice", "guided_regex", "guided_grammar")
_TOOL_FIELDS = ("tools", "functions", "tool_choice", "function_call")


@dataclass(frozen=True)
class ModelRequest:
    """A checked request. `images` are those of all messages, in order; `text_field` is what the client called them."""

    messages: tuple[Message, ...]
    images: tuple[bytes, ...]
    options: Options
    stream: bool
    include_usage: bool
    text_field: str = "messages"

    def header(self) -> dict[str, Any]:
        """Everything but the images, for the child as JSON."""
        messages = [asdict(message) for message in self.messages]
        return {"messages": messages, "options": asdict(self.options), "images": [len(data) for data in self.images]}


def parse_chat(body: Mapping[str, Any], model: str, limits: Limits) -> ModelRequest:
    """Check a request to /v1/chat/completions. Raises `Problem` (400, 404)."""
    check_model(body, model)
    return parse_messages(body, body.get("messages"), limits, "messages")


def parse_messages(
    body: Mapping[str, Any], turns: object, limits: Limits, field: str, *, system: str = ""
) -> ModelRequest:
    """Check messages, and everything else in `body` but the model. Raises `Problem` (400).

    field: the client's name for the messages. system: text of a system message before them.
    """
    if not isinstance(turns, list) or not 1 <= len(turns) <= limits.messages:
        raise bad_request(f"{field} must be a list of 1 to {limits.messages} messages.", field)
    images: list[bytes] = []
    parsed = [_parse_message(turn, f"{field}[{i}]", images) for i, turn in enumerate(turns)]
    messages = _merge_turns([*([Message("system", system)] if system else []), *parsed], field)
    count = body.get("top_logprobs")
    if count and not body.get("logprobs"):
        raise bad_request("top_logprobs needs logprobs to be true.", "top_logprobs")
    top_logprobs = (0 if count is None else count) if _flag(body, "logprobs") else None
    return _model_request(body, messages, images, top_logprobs, limits, field)


def parse_completion(body: Mapping[str, Any], model: str, limits: Limits) -> ModelRequest:
    """Check a request to /v1/completions, whose prompt becomes a user message. Raises `Problem` (400, 404)."""
    check_model(body, model)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise bad_request("prompt must be one string.", "prompt")
    if _max_tokens(body) is None:
        body = {**body, "max_tokens": 16}
    return _model_request(body, [Message("user", prompt)], [], body.get("logprobs"), limits, "prompt")


def _model_request(
    body: Mapping[str, Any],
    messages: Sequence[Message],
    images: list[bytes],
    top_logprobs: Any,
    limits: Limits,
    text_field: str,
) -> ModelRequest:
    refuse_unsupported(body, _NO_EFFECT | (_NO_EFFECT_IF_CONTINUED if messages[-1].role == "assistant" else {}))
    if len(images) > limits.images:
        raise bad_request(f"There are {len(images)} images; at most {limits.images} are accepted.", text_field)
    if sum(len(message.text.encode("utf-8", "replace")) for message in messages) > limits.prompt:
        problem = f"The {text_field} must have at most {limits.prompt} bytes of text."
        raise bad_request(problem, text_field, "context_length_exceeded")
    stream_options = body.get("stream_options")
    if stream_options is not None and not isinstance(stream_options, dict):
        raise bad_request("stream_options must be an object.", "stream_options")
    include_usage = _flag(stream_options or {}, "include_usage")
    return ModelRequest(
        tuple(messages),
        tuple(images),
        _options(body, top_logprobs),
        _flag(body, "stream"),
        include_usage,
        text_field,
    )


def refuse_unsupported(body: Mapping[str, Any], no_effect: Mapping[str, tuple[object, ...]]) -> None:
    """Raise `Problem` (400) if a field has a value that is not among those of `no_effect`."""
    for name, values in no_effect.items():
        value = body.get(name)
        if value is None or (name in _TOOL_CHOICE and body.get(_TOOL_CHOICE[name]) == "none"):
            continue
        if any(value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in values):
            continue
        raise bad_request(f"{name} is not supported by this server; {_advice(name)}.", name)


def _advice(unsupported: str) -> str:
    if unsupported in _GRAMMAR_FIELDS:
        return "use response_format with a JSON schema instead"  # guided_json is a schema already
    if unsupported in _TOOL_FIELDS:  # by which many clients ask for structured answers, unless told otherwise
        return "remove it, or use a JSON schema if it is for structured answers"
    return "remove it"


_MAX_TOKENS_NAMES = ("max_completion_tokens", "max_tokens", "max_output_tokens", "n_predict", "num_predict")
_REPEAT_PENALTY_NAMES = ("repeat_penalty", "repetition_penalty")
# Options and their names in requests; `logprobs` is a number in /v1/completions.
_ALIASES = {
    "max_tokens": _MAX_TOKENS_NAMES,
    "repeat_penalty": _REPEAT_PENALTY_NAMES,
    "top_logprobs": ("top_logprobs", "logprobs"),
}
_SAME_OPTIONS = ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "image_tokens")


def _options(body: Mapping[str, Any], top_logprobs: Any) -> Options:
    """Greedy unless a temperature is given; then with a random seed unless one is given."""
    given = {name: body.get(name) for name in _SAME_OPTIONS} | {
        "max_tokens": _max_tokens(body),
        "top_k": 0 if body.get("top_k") == -1 else body.get("top_k"),  # -1: all, as in vLLM
        "repeat_penalty": _first_of(body, _REPEAT_PENALTY_NAMES),
        "top_logprobs": top_logprobs,
        "seed": _seed(body),
        "stop": _stop_sequences(body.get("stop")),
        "grammar": _grammar(body),  # made from a schema; the request's own `grammar` is refused
    }
    try:
        return Options(**{name: value for name, value in given.items() if value is not None})
    except OptionError as error:
        names = _ALIASES.get(error.field, (error.field,))
        field = next((name for name in names if body.get(name) is not None), error.field)
        raise bad_request(f"{field} {error.problem}", field) from error


def _max_tokens(body: Mapping[str, Any]) -> Any:
    """The limit by any of its names; -1 is only the context's limit, as in llama.cpp's server."""
    limit = _first_of(body, _MAX_TOKENS_NAMES)
    return MAX_TOKENS if limit == -1 else limit


def _first_of(body: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The first value given among several names of a field."""
    return next((body[name] for name in names if body.get(name) is not None), None)


def is_name_of(name: str, model: str) -> bool:
    """Whether a name is the model's. Programs take one with a tag from /api/tags, and use it under /v1 too."""
    return name.removesuffix(":latest") == model


def check_model(body: Mapping[str, Any], model: str) -> None:
    """The name may be missing. Another model's is refused: the answer would be taken for that model's."""
    name = body.get("model")
    if name is None or name == "":
        return
    if not isinstance(name, str):
        raise bad_request(f"model must be a string; this server has the model {model!r}.", "model")
    if not is_name_of(name, model):
        raise Problem(404, f"This server has the model {model!r} only.", param="model", code="model_not_found")


def _parse_message(turn: object, param: str, images: list[bytes]) -> Message:
    """Check one message, appending its images to `images`."""
    if not isinstance(turn, dict):
        raise bad_request("A message must be an object.", param)
    role, content = turn.get("role"), turn.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        raise bad_request(f"The role of a message must be one of {', '.join(_ROLES)}.", f"{param}.role")
    if turn.get("images"):
        raise bad_request(
            "Images must be parts of the content, of type image_url, not a field of the message.",
            f"{param}.images",
        )
    if role == "assistant" and not content:  # null if it called tools
        content = ""
    if isinstance(content, str):
        return Message(_ROLES[role], content)
    if not isinstance(content, list) or not content:
        raise bad_request("The content of a message must be a string or a list of parts.", f"{param}.content")
    texts: list[str] = []
    before = len(images)
    for i, part in enumerate(content):
        _parse_part(part, f"{param}.content[{i}]", texts, images)
    if len(images) > before and role != "user":
        raise bad_request("Only user messages can have images.", f"{param}.content")
    return Message(_ROLES[role], "\n".join(texts), len(images) - before)


def _parse_part(part: object, param: str, texts: list[str], images: list[bytes]) -> None:
    type_name = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and type_name in ("text", "refusal") and isinstance(part.get(type_name), str):
        texts.append(part[type_name])
    elif isinstance(part, dict) and type_name == "image_url":
        source = part.get("image_url")
        url = source.get("url") if isinstance(source, dict) else source
        images.append(data_url.decode(url, f"{param}.image_url"))
    else:
        raise bad_request("A part of a message must have the type text or image_url, and that field.", param)


def _merge_turns(messages: Sequence[Message], field: str) -> list[Message]:
    """Merge system messages into one at the front, and consecutive messages of one role, as prompt layouts require.

    Raises `Problem` unless the first message after the system's is the user's: no layout starts with an answer.
    """
    system = [message for message in messages if message.role == "system"]
    others = [message for message in messages if message.role != "system"]
    merged = [_merge(list(turn)) for _, turn in groupby(others, lambda message: message.role)]
    if not merged or merged[0].role != "user":
        raise bad_request("The first message after the system message must have the role user.", field)
    return [*([_merge(system)] if system else []), *merged]


def _merge(messages: list[Message]) -> Message:
    text, images = "\n".join(message.text for message in messages), sum(message.images for message in messages)
    return Message(messages[0].role, text, images)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise bad_request(f"{name} must be true or false.", name)
    return value


def _seed(body: Mapping[str, Any]) -> int:
    seed = body.get("seed")
    if seed in (None, -1):  # -1: random, as in llama.cpp's server
        return secrets.randbits(32)
    if type(seed) is not int or not -(1 << 63) <= seed < 1 << 63:
        raise bad_request("seed must be an integer of at most 64 bits.", "seed")
    return seed % (1 << 32)


def _stop_sequences(stop: object) -> tuple[str, ...] | None:
    if stop is None:
        return None
    texts = [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise bad_request("stop must be a string or a list of strings.", "stop")
    return tuple(filter(None, texts))  # "" means none


def _grammar(body: Mapping[str, Any]) -> str | None:
    grammar = _response_format_grammar(body.get("response_format"))
    if body.get("json_schema") is None:
        return grammar
    if grammar:
        raise bad_request("response_format and json_schema both constrain the answer; use only one.", "json_schema")
    return _schema_grammar(body["json_schema"], "json_schema")


def _response_format_grammar(response_format: object) -> str | None:
    if response_format is None:
        return None
    type_name = response_format.get("type") if isinstance(response_format, dict) else None
    if type_name == "text":
        return None
    if not isinstance(response_format, dict) or type_name not in ("json_object", "json_schema"):
        raise bad_request("response_format must have the type text, json_object or json_schema.", "response_format")
    if type_name == "json_object":  # in which llama.cpp's server may have a schema
        schema = response_format.get("schema")
        return _schema_grammar({"type": "object"} if schema is None else schema, "response_format")
    holder = response_format.get("json_schema")
    if not isinstance(holder, dict) or "schema" not in holder:
        raise bad_request("response_format.json_schema must be an object with a schema in it.", "response_format")
    return _schema_grammar(holder["schema"], "response_format")


def _schema_grammar(schema: object, param: str) -> str:
    try:
        return from_schema(schema)
    except UsageError as error:
        raise bad_request(str(error), param) from error
