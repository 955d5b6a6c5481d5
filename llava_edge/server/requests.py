"""What OpenAI's clients send -> what the model is asked. Every value is checked here; nothing else is passed on.

A field that would change the answer and is not supported is refused; fields that are unknown are ignored.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from llava_edge.errors import UsageError
from llava_edge.json_grammar import any_object, from_schema
from llava_edge.options import MAX_TOKENS, Options
from llava_edge.prompt import Message
from llava_edge.server import data_url
from llava_edge.server.limits import Limits
from llava_edge.server.problems import Problem, bad_request

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

# What would change the answer if it were kept to, and the values that change nothing: of OpenAI's fields, then of those
# that llama.cpp's server and vLLM have beside them. Fields that need one of these to do anything are not here.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logit_bias": ({}, []),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),  # of no tools
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
    # llama.cpp writes one that it cannot read into the log, and follows branches without end until it is killed.
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
# The same where the last message is an answer, which is gone on with.
_GOING_ON: dict[str, tuple[object, ...]] = {"add_generation_prompt": (True, False), "continue_final_message": (True,)}
# What matters only if the model may use it, and the field that can say it may not.
_CHOICES = {"tools": "tool_choice", "functions": "function_call"}
_FORMS = ("grammar", "structured_outputs", "guided_json", "guided_choice", "guided_regex", "guided_grammar")


@dataclass(frozen=True)
class Ask:
    """One checked request. `images` belong to the messages' slots in order."""

    messages: tuple[Message, ...]
    images: tuple[bytes, ...]
    options: Options
    stream: bool
    include_usage: bool

    def header(self) -> dict[str, Any]:
        """All but the images, as JSON for the child."""
        messages = [asdict(message) for message in self.messages]
        return {"messages": messages, "options": asdict(self.options), "images": [len(data) for data in self.images]}


def chat(body: Mapping[str, Any], model: str, limits: Limits) -> Ask:
    """A request for /v1/chat/completions. Raises `Problem` (400, 404)."""
    _check_model(body, model)
    turns = body.get("messages")
    if not isinstance(turns, list) or not 1 <= len(turns) <= limits.messages:
        raise bad_request(f"messages must be a list of 1 to {limits.messages} messages.", "messages")
    images: list[bytes] = []
    messages = _in_turns([_message(turn, f"messages[{i}]", images) for i, turn in enumerate(turns)])
    top = body.get("top_logprobs")
    if top and not body.get("logprobs"):
        raise bad_request("top_logprobs needs logprobs to be true.", "top_logprobs")
    chances = (0 if top is None else top) if _flag(body, "logprobs") else None
    return _ask(body, messages, images, chances, limits)


def completion(body: Mapping[str, Any], model: str, limits: Limits) -> Ask:
    """A request for /v1/completions; its prompt is asked as a question. Raises `Problem` (400, 404)."""
    _check_model(body, model)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise bad_request("prompt must be one text.", "prompt")
    if _longest(body) is None:
        body = {**body, "max_tokens": 16}
    return _ask(body, [Message("user", prompt)], [], body.get("logprobs"), limits)


def _ask(
    body: Mapping[str, Any], messages: Sequence[Message], images: list[bytes], chances: Any, limits: Limits
) -> Ask:
    _refuse_unsupported(body, _NEUTRAL | (_GOING_ON if messages[-1].role == "assistant" else {}))
    if len(images) > limits.images:
        raise bad_request(f"There are {len(images)} images; at most {limits.images} are accepted.", "messages")
    if sum(len(message.text.encode("utf-8", "replace")) for message in messages) > limits.prompt:
        raise bad_request(f"The texts have more than {limits.prompt} bytes.", "messages", "context_length_exceeded")
    extra = body.get("stream_options")
    if extra is not None and not isinstance(extra, dict):
        raise bad_request("stream_options must be an object.", "stream_options")
    usage = _flag(extra or {}, "include_usage")
    return Ask(tuple(messages), tuple(images), _options(body, chances), _flag(body, "stream"), usage)


def _refuse_unsupported(body: Mapping[str, Any], neutral: Mapping[str, tuple[object, ...]]) -> None:
    for name, values in neutral.items():
        value = body.get(name)
        if value is None or (name in _CHOICES and body.get(_CHOICES[name]) == "none"):
            continue
        if any(value == same and isinstance(value, bool) == isinstance(same, bool) for same in values):
            continue
        instead = "ask for a JSON schema in response_format" if name in _FORMS else "leave it out"
        raise bad_request(f"{name} is not supported by this server; {instead}.", name)


_LONGEST = ("max_completion_tokens", "max_tokens", "n_predict")
_PENALTY = ("repeat_penalty", "repetition_penalty")
_CHANCES = ("top_logprobs", "logprobs")  # the second: how many, in /v1/completions


def _options(body: Mapping[str, Any], chances: Any) -> Options:
    """Greedy unless a temperature is given; then drawn anew each time unless a seed is given."""
    given = {
        "max_tokens": _longest(body),
        "temperature": body.get("temperature"),
        "top_p": body.get("top_p"),
        "top_k": 0 if body.get("top_k") == -1 else body.get("top_k"),  # both are all, for vLLM and llama.cpp's server
        "min_p": body.get("min_p"),
        "repeat_penalty": _first(body, _PENALTY),
        "frequency_penalty": body.get("frequency_penalty"),
        "presence_penalty": body.get("presence_penalty"),
        "image_tokens": body.get("image_tokens"),
        "top_logprobs": chances,
        "seed": _seed(body),
        "stop": _stop(body.get("stop")),
        "grammar": _grammar(body),  # the field of that name is refused
    }
    try:
        return Options(**{name: value for name, value in given.items() if value is not None})
    except UsageError as error:
        param = next((name for name in given if name in str(error)), "")
        names = {"max_tokens": _LONGEST, "repeat_penalty": _PENALTY, "top_logprobs": _CHANCES}.get(param, (param,))
        said = next((name for name in names if body.get(name) is not None), param)
        raise bad_request(str(error).replace(param, said), said or None) from error


def _longest(body: Mapping[str, Any]) -> Any:
    """By whichever name it is given; -1 is no limit but the context's, as for llama.cpp's server."""
    longest = _first(body, _LONGEST)
    return MAX_TOKENS if longest == -1 else longest


def _first(body: Mapping[str, Any], names: Sequence[str]) -> Any:
    """What is given by one of several names."""
    return next((body[name] for name in names if body.get(name) is not None), None)


def _check_model(body: Mapping[str, Any], model: str) -> None:
    """None at all is the one there is. Another's name is refused: its answer would be taken for that model's."""
    name = body.get("model")
    if name is None or name == "":
        return
    if not isinstance(name, str):
        raise bad_request(f"model must be a text; this server has {model!r}.", "model")
    if name != model:
        raise Problem(404, f"This server has the model {model!r} only.", param="model", code="model_not_found")


def _message(turn: object, param: str, images: list[bytes]) -> Message:
    """One message; its pictures are appended to `images`."""
    if not isinstance(turn, dict):
        raise bad_request("A message must be an object.", param)
    role, content = turn.get("role"), turn.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        raise bad_request(f"The role of a message must be one of {', '.join(_ROLES)}.", f"{param}.role")
    if turn.get("images"):
        raise bad_request(
            "Pictures must be parts of the content, of type image_url, not images of a message.", f"{param}.images"
        )
    if role == "assistant" and not content:  # null, of one that called tools
        content = ""
    if isinstance(content, str):
        return Message(_ROLES[role], content)  # type: ignore[arg-type]
    if not isinstance(content, list) or not content:
        raise bad_request("The content of a message must be a text or a list of parts.", f"{param}.content")
    texts: list[str] = []
    before = len(images)
    for i, part in enumerate(content):
        _part(part, f"{param}.content[{i}]", texts, images)
    if len(images) > before and role != "user":
        raise bad_request("Only messages of the user can have images.", f"{param}.content")
    return Message(_ROLES[role], "\n".join(texts), len(images) - before)  # type: ignore[arg-type]


def _part(part: object, param: str, texts: list[str], images: list[bytes]) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and kind in ("text", "refusal") and isinstance(part.get(kind), str):
        texts.append(part[kind])
    elif isinstance(part, dict) and kind == "image_url":
        source = part.get("image_url")
        url = source.get("url") if isinstance(source, dict) else source
        images.append(data_url.decode(url, f"{param}.image_url"))
    else:
        raise bad_request("A part of a message must be of type text or image_url, with that field.", param)


def _in_turns(messages: Sequence[Message]) -> list[Message]:
    """As prompt layouts have it: system messages first, as one, and neighbours of one role as one message.

    Raises `Problem` unless a user's message is then the first of the others: no layout has an answer before a question.
    """
    system = [message for message in messages if message.role == "system"]
    others = [message for message in messages if message.role != "system"]
    found = [_joined(list(turn)) for _, turn in groupby(others, lambda message: message.role)]
    if not found or found[0].role != "user":
        raise bad_request("The first message after the system's must be a user's.", "messages")
    return [*([_joined(system)] if system else []), *found]


def _joined(messages: list[Message]) -> Message:
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
    if seed in (None, -1):  # the second: any, as for llama.cpp's server
        return secrets.randbits(32)
    if type(seed) is not int or not -(1 << 63) <= seed < 1 << 63:
        raise bad_request("seed must be a whole number of at most 64 bits.", "seed")
    return seed % (1 << 32)


def _stop(stop: object) -> tuple[str, ...] | None:
    if stop is None:
        return None
    texts = [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise bad_request("stop must be a text or a list of texts.", "stop")
    return tuple(filter(None, texts))  # an empty one is meant for none


def _grammar(body: Mapping[str, Any]) -> str | None:
    grammar = _form(body.get("response_format"))
    if body.get("json_schema") is None:
        return grammar
    if grammar:
        raise bad_request("response_format and json_schema both name a form; one of them was expected.", "json_schema")
    return _of_schema(body["json_schema"], "json_schema")


def _form(wanted: object) -> str | None:
    if wanted is None:
        return None
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind == "text":
        return None
    if not isinstance(wanted, dict) or kind not in ("json_object", "json_schema"):
        raise bad_request("response_format must have the type text, json_object or json_schema.", "response_format")
    if kind == "json_object" and wanted.get("schema") is None:
        return any_object()
    given = wanted if kind == "json_object" else wanted.get("json_schema")  # the first: llama.cpp's server has it so
    if not isinstance(given, dict) or "schema" not in given:
        raise bad_request("response_format.json_schema must be an object with a schema in it.", "response_format")
    return _of_schema(given["schema"], "response_format")


def _of_schema(schema: object, param: str) -> str:
    try:
        return from_schema(schema)
    except UsageError as error:
        raise bad_request(str(error), param) from error
