"""Ollama's API as programs written for it meet it: the official `ollama` client against a real process."""

from __future__ import annotations

import base64
import json
import os
import signal
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from typing import Any

import pytest
from serving import Server, data_url, png

from llava_edge import Llava, Options
from llava_edge.options import result_of
from llava_edge.prompt import Message
from llava_edge.server.ollama import Reply

ollama = pytest.importorskip("ollama", reason="the ollama client is not installed")

SHORT = {"num_predict": 16}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    with ollama.Client(host=f"http://127.0.0.1:{server.port}") as made:
        yield made


@pytest.fixture(scope="module")
def chat(client: Any) -> Any:
    return partial(client.chat, "micro", options=SHORT)


@pytest.fixture(scope="module")
def generate(client: Any) -> Any:
    return partial(client.generate, "micro", options=SHORT)


def user(text: str, *images: bytes) -> dict[str, Any]:
    return {"role": "user", "content": text, "images": list(images)}


def refusal(request: Any, **fields: Any) -> tuple[int, str]:
    with pytest.raises(ollama.ResponseError) as error:
        request(**fields)
    return error.value.status_code, error.value.error


def post(server: Server, path: str, **body: Any) -> tuple[int, str]:
    status, _, answer = server.request("POST", path, body)
    error = json.loads(answer)["error"]
    assert isinstance(error, str)
    return status, error


def test_an_answer_is_the_librarys_answer(chat: Any, llava: Llava) -> None:
    red, blue = png("red"), png("blue")
    for text, images in (("What?", []), ("What colour?", [red]), ("What colour?", [red, blue]), ("", [red])):
        wanted = llava.ask(text, images, Options(max_tokens=16))
        got = chat([user(text, *images)])
        assert (got.message.role, got.message.content) == ("assistant", wanted.text)
        assert (got.model, got.done, got.done_reason) == ("micro", True, wanted.finish_reason)
        assert (got.prompt_eval_count, got.eval_count) == (wanted.prompt_tokens, wanted.completion_tokens)
        assert datetime.fromisoformat(got.created_at).tzinfo
        assert 0 < got.prompt_eval_duration < got.total_duration
        assert 0 < got.eval_duration < got.total_duration


def test_durations_are_nanoseconds_and_pictures_are_part_of_the_prompt() -> None:
    """None is zero: clients divide by them."""
    timings = {"preprocess_ms": 1.0, "encode_ms": 20.0, "prefill_ms": 300.0, "decode_ms": 0.0, "total_ms": 5000.0}
    result = {"finish_reason": "stop", "prompt_tokens": 7, "completion_tokens": 2, "timings": timings}
    got = Reply("micro", chat=True).complete([{"text": "Yes", "chances": [], "result": result}])
    wanted = {"prompt_eval_duration": 321_000_000, "eval_duration": 1, "total_duration": 5_000_000_000}
    assert {name: got[name] for name in wanted} == wanted


def test_the_stream_is_the_answer(chat: Any, generate: Any, server: Server) -> None:
    whole = chat([user("Tell me about it.", png())])
    parts = list(chat([user("Tell me about it.", png())], stream=True))
    assert "".join(part.message.content for part in parts) == whole.message.content
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].eval_count == whole.eval_count == 16
    parts = list(generate("Tell me about it.", images=[png()], stream=True))
    assert "".join(part.response for part in parts) == whole.message.content
    assert len(parts) > 2


def test_answers_are_streamed_unless_refused(server: Server) -> None:
    body = {"model": "micro", "prompt": "Hello", "options": SHORT}
    status, headers, lines = server.request("POST", "/api/generate", body)
    assert (status, headers["content-type"], headers["x-accel-buffering"]) == (200, "application/x-ndjson", "no")
    assert len(lines.splitlines()) > 2
    status, headers, line = server.request("POST", "/api/generate", body | {"stream": False})
    assert (status, headers["content-type"]) == (200, "application/json")
    assert json.loads(line)["response"] == "".join(json.loads(part)["response"] for part in lines.splitlines())


def test_generate_with_a_system_message(generate: Any, llava: Llava) -> None:
    messages = [Message("system", "Be kind."), Message("user", "What is it?", 1)]
    wanted = result_of(llava.answer(messages, [png()], Options(max_tokens=16)))
    got = generate("What is it?", system="Be kind.", images=[png()])
    assert (got.response, got.prompt_eval_count) == (wanted.text, wanted.prompt_tokens)


def test_an_empty_system_message_is_none(chat: Any) -> None:
    """The client drops its content."""
    wanted, got = chat([user("Hello")]), chat([{"role": "system", "content": ""}, user("Hello")])
    assert (got.message.content, got.prompt_eval_count) == (wanted.message.content, wanted.prompt_eval_count)


def test_a_conversation(chat: Any, llava: Llava) -> None:
    talk = llava.chat(system="Be kind.", options=Options(max_tokens=16))
    messages: list[Any] = [{"role": "system", "content": "Be kind."}]
    for text, images in (("What is it?", [png()]), ("And this?", [png("blue")]), ("Why?", [])):
        messages.append(user(text, *images))
        messages.append(chat(messages).message)
        assert messages[-1].content == "".join(chunk.text for chunk in talk.say(text, images))


def test_options(chat: Any, llava: Llava) -> None:
    def answer(**options: Any) -> Any:
        return chat([user("Hello")], options={**SHORT, **options})

    whole = answer().message.content
    assert answer(num_ctx=8192, num_thread=4, num_gpu=0, low_vram=False).message.content == whole
    stopped = answer(stop=[whole[3:5]])
    assert (stopped.message.content, stopped.done_reason) == (whole[: whole.index(whole[3:5])], "stop")
    sampled = answer(temperature=1.5, seed=7, top_k=50, top_p=0.9, min_p=0.01).message.content
    wanted = llava.ask("Hello", [], Options(max_tokens=16, temperature=1.5, seed=7, top_k=50, top_p=0.9, min_p=0.01))
    assert sampled == wanted.text != whole
    assert answer(num_predict=3).eval_count == 3
    unlimited = [chat([user("Hello")], options={"num_predict": count}) for count in (-1, -2)]
    assert unlimited[0].message.content == unlimited[1].message.content
    assert unlimited[0].eval_count > 16


def test_formats(chat: Any, generate: Any) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"]}
    for text in (
        chat([user("Hello")], format=schema, options={"num_predict": 64}).message.content,
        generate("Hello", format=schema, options={"num_predict": 64}).response,
    ):
        assert json.loads(text)["n"] <= 9
    assert generate("Hello", format="json", options={"num_predict": 8}).response.startswith("{")
    assert generate("Hello", format="").response == generate("Hello").response


def test_log_probabilities(generate: Any, llava: Llava) -> None:
    wanted: list[Any] = []
    for chunk in llava.answer([Message("user", "Hello")], [], Options(max_tokens=16, top_logprobs=2)):
        wanted += chunk.chances
    got = generate("Hello", logprobs=True, top_logprobs=2).logprobs
    assert [chance.logprob for chance in got] == [chance.logprob for chance in wanted]
    assert [len(chance.top_logprobs) for chance in got] == [2] * 16


def test_images_may_be_data_urls(server: Server) -> None:
    """A page's FileReader gives pictures in no other form."""
    answers = []
    for image in (base64.b64encode(png()).decode(), data_url(png())):
        body = {"model": "micro", "prompt": "Colour?", "images": [image], "stream": False, "options": SHORT}
        answers.append(json.loads(server.request("POST", "/api/generate", body)[2])["response"])
    assert answers[0] == answers[1]


def test_a_request_without_a_question_loads_the_model(client: Any) -> None:
    loaded = client.generate("micro")
    assert (loaded.done, loaded.done_reason) == (True, "load")
    assert client.chat("micro", messages=[], keep_alive=-1).message.content == ""


def test_the_model_is_listed(client: Any, server: Server) -> None:
    for listed in (client.list(), client.ps()):
        (model,) = listed.models
        assert model.model == "micro:latest"
        assert model.size > 100_000
        assert len(model.digest) == 64
        assert model.details.quantization_level == "Q8_0"
    shown = client.show(client.list().models[0].model)
    assert shown.capabilities == ["completion", "vision"]
    context = server.health()["context"]
    assert shown.modelinfo["llama.context_length"] == client.ps().models[0].context_length == context
    assert shown.modelinfo["general.basename"] == "micro"
    assert client.ps().models[0].size_vram == 0  # on a CPU
    assert json.loads(server.request("GET", "/api/version")[2])["version"].count(".") == 2


def test_listings_have_every_field_that_ollama_sends(server: Server) -> None:
    """Clients in Rust, Go and TypeScript require them. Ollama's source: `api/types.go`, those without `omitempty`."""
    listed = {"name", "model", "modified_at", "size", "digest", "details"}
    loaded = listed - {"modified_at"} | {"expires_at", "size_vram", "context_length"}
    details = {"parent_model", "format", "family", "families", "parameter_size", "quantization_level"}
    for path, names in (("/api/tags", listed), ("/api/ps", loaded)):
        (model,) = json.loads(server.request("GET", path)[2])["models"]
        assert names <= set(model)
        assert set(model["details"]) == details
        assert datetime.fromisoformat(model["modified_at"]).tzinfo  # as RFC 3339 has it, which Go's clients insist on


def test_names_of_models(client: Any, server: Server) -> None:
    assert client.generate("micro:latest", "Hello", options=SHORT).model == "micro:latest"
    for request in (client.generate, client.chat, client.show):
        status, error = refusal(request, model="llava:7b")
        assert (status, error) == (404, "This server has the model 'micro' only.")
    for name, status in (("micro", 200), ("llava:7b", 404)):  # deprecated in Ollama's `api/types.go`
        assert server.request("POST", "/api/show", {"name": name})[0] == status


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"think": True}, "think"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"options": {"mirostat": 2}}, "mirostat"),
        ({"options": {"num_predict": 0}}, "num_predict"),
        ({"options": {"num_predict": "4"}}, "num_predict"),
        ({"options": {"temperature": -1}}, "temperature"),
        ({"options": [1]}, "options"),
        ({"format": "yaml"}, "format"),
        ({"format": {"type": "string", "pattern": "(?=a)"}}, "pattern"),
        ({"stream": 1}, "stream"),
    ],
)
def test_what_cannot_be_done_is_refused(server: Server, fields: dict[str, Any], named: str) -> None:
    for status, error in (
        post(server, "/api/generate", model="micro", prompt="Hello", **fields),
        post(server, "/api/chat", model="micro", messages=[user("Hello")], **fields),
    ):
        assert status == 400
        assert named in error


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"raw": True}, "raw"),
        ({"template": "{{ .Prompt }}"}, "template"),
        ({"suffix": "!"}, "suffix"),
        ({"context": [1, 2]}, "context"),
        ({"prompt": ["Hello"]}, "prompt"),
        ({"system": 1}, "system"),
        ({"images": "iVBO"}, "images"),
        ({"images": [1]}, "images"),
        ({"images": ["###"]}, "base64"),
        ({"images": [data_url(png(), "heic")]}, "heif-convert"),
        ({"images": ["aGVsbG8="]}, "not a picture"),
        ({"model": 3}, "model"),
    ],
)
def test_requests_to_generate_that_are_refused(server: Server, fields: dict[str, Any], named: str) -> None:
    status, error = post(server, "/api/generate", **{"model": "micro", "prompt": "Hello", **fields})
    assert status == 400
    assert named in error


@pytest.mark.parametrize(
    "messages",
    ["Hello", ["Hello"], [{"role": "tool", "content": "4"}], [{"role": "user"}], [user("a") | {"images": "iVBO"}]],
)
def test_messages_that_are_refused(server: Server, messages: Any) -> None:
    assert post(server, "/api/chat", model="micro", messages=messages)[0] == 400


def test_refusals_elsewhere_have_the_same_format(server: Server) -> None:
    assert post(server, "/api/pull", model="micro") == (404, "This server does not have this part of the API.")
    for method, body, headers in (
        ("POST", b"{}", {"Content-Type": "text/plain", "User-Agent": "Mozilla/5.0"}),
        ("POST", b"{", {}),
        ("GET", None, {}),
        ("GET", None, {"Host": "evil.example"}),
    ):
        status, _, answer = server.request(method, "/api/chat", body, headers)
        assert status in (400, 403, 405, 415)
        assert isinstance(json.loads(answer)["error"], str)


def test_a_stream_ends_with_an_error_if_the_model_dies(client: Any, server: Server) -> None:
    stream = client.chat("micro", [user("Hello")], stream=True, options={"num_predict": -1})
    next(stream)
    os.kill(server.child(), signal.SIGKILL)
    with pytest.raises(ollama.ResponseError, match="ended while it worked"):
        list(stream)
    server.wait_until(lambda: server.health()["status"] == "ok")
