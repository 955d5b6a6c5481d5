"""OpenAI's /v1/responses as programs meet it: the official `openai` client against a real process."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from serving import Server, data_url, png

from llava_edge import Llava, Options
from llava_edge.options import result_of
from llava_edge.prompt import Message

openai = pytest.importorskip("openai", reason="the openai client is not installed")


@pytest.fixture(scope="module")
def create(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
        yield partial(client.responses.create, model="micro")


def user(text: str, *images: bytes) -> dict[str, Any]:
    parts: list[Any] = [{"type": "input_image", "image_url": data_url(data), "detail": "auto"} for data in images]
    return {"role": "user", "content": [*parts, *([{"type": "input_text", "text": text}] if text else [])]}


def refusal(server: Server, **body: Any) -> tuple[int, dict[str, Any]]:
    status, _, answer = server.request("POST", "/v1/responses", {"model": "micro", "input": "Hello", **body})
    error: dict[str, Any] = json.loads(answer)["error"]
    return status, error


def test_an_answer_is_the_librarys_answer(create: Any, llava: Llava) -> None:
    red, blue = png("red"), png("blue")
    for text, images in (("What?", []), ("What colour?", [red]), ("What colour?", [red, blue]), ("", [red])):
        wanted = llava.ask(text, images, Options(max_tokens=16))
        got = create(input=[user(text, *images)], max_output_tokens=16)
        assert got.output_text == wanted.text
        assert (got.status, got.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert (got.usage.input_tokens, got.usage.output_tokens) == (wanted.prompt_tokens, wanted.completion_tokens)
        assert got.usage.total_tokens == wanted.prompt_tokens + wanted.completion_tokens
        assert got.to_dict()["llava_edge"]["image_tokens"] == wanted.image_tokens


def test_every_object_is_as_the_client_declares_it(create: Any) -> None:
    """The client itself checks nothing; its types do, when asked."""
    from openai.types import responses as types
    from pydantic import TypeAdapter

    options = {"input": [user("Hello", png())], "top_logprobs": 2, "metadata": {"a": "b"}, "max_output_tokens": 8}
    events = list(create(**options, stream=True))
    event_type: Any = TypeAdapter(types.ResponseStreamEvent)
    for event in events:
        event_type.validate_python(event.to_dict(), strict=True)
    types.Response.model_validate(create(**options).to_dict(), strict=True)


def test_the_stream_is_the_answer(create: Any) -> None:
    question = {"input": [user("Tell me about it.", png())], "max_output_tokens": 24}
    whole = create(**question)
    events = list(create(**question, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    begin = ["created", "in_progress", "output_item.added", "content_part.added"]
    end = ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    texts = ["output_text.delta"] * (len(events) - 8)
    assert [event.type.removeprefix("response.") for event in events] == begin + texts + end
    assert len(texts) > 2
    assert events[2].item.content == []  # the part comes with an event of its own
    assert "".join(event.delta for event in events[4:-4]) == whole.output_text == events[-4].text
    last = events[-1].response
    assert (last.output_text, last.usage.output_tokens) == (whole.output_text, whole.usage.output_tokens)
    assert {events[0].response.id, events[1].response.id} == {last.id} != {whole.id}


def test_half_a_surrogate_pair_is_repeated_as_a_question_mark(server: Server) -> None:
    body = {"input": "Hello", "metadata": {"half": "\ud83d", "whole": "😀"}, "max_output_tokens": 2}
    status, _, answer = server.request("POST", "/v1/responses", body)
    assert (status, json.loads(answer).get("metadata")) == (200, {"half": "?", "whole": "😀"})


def test_instructions_are_the_system_message(create: Any, llava: Llava) -> None:
    messages = [Message("system", "Be kind.\nBe brief."), Message("user", "Hello")]
    wanted = result_of(llava.answer(messages, (), Options(max_tokens=16)))
    items = [{"role": "developer", "content": "Be brief."}, {"type": "message", "role": "user", "content": "Hello"}]
    got = create(instructions="Be kind.", input=items, max_output_tokens=16)
    assert (got.output_text, got.usage.input_tokens) == (wanted.text, wanted.prompt_tokens)
    assert got.instructions == "Be kind."


def test_a_conversation(create: Any, llava: Llava) -> None:
    """Answers go back as they came, as objects."""
    chat = llava.chat(options=Options(max_tokens=12))
    items: list[Any] = []
    for text, images in (("What is it?", [png()]), ("And this?", [png("blue")]), ("Why?", [])):
        items.append(user(text, *images))
        answer = create(input=items, max_output_tokens=12)
        items += answer.output
        assert answer.output_text == "".join(chunk.text for chunk in chat.say(text, images))


def test_a_refusal_goes_back_as_an_answer(create: Any) -> None:
    used = []
    for part in ({"type": "refusal", "refusal": "No, never."}, {"type": "output_text", "text": "No, never."}):
        items = [user("Hello"), {"role": "assistant", "content": [part]}, user("Why?")]
        used.append(create(input=items, max_output_tokens=2).usage.input_tokens)
    assert used[0] == used[1] > create(input=[user("Hello"), user("Why?")], max_output_tokens=2).usage.input_tokens + 4


def test_an_empty_answer_goes_back_as_it_came(create: Any, llava: Llava) -> None:
    whole = create(input="Hello", max_output_tokens=4)
    empty = create(input="Hello", max_output_tokens=4, extra_body={"stop": whole.output_text[:1]})
    assert empty.output_text == ""
    messages = [Message("user", "Hello"), Message("assistant", ""), Message("user", "Well?")]
    wanted = result_of(llava.answer(messages, (), Options(max_tokens=8)))
    got = create(input=[user("Hello"), *empty.output, user("Well?")], max_output_tokens=8)
    assert (got.output_text, got.usage.input_tokens) == (wanted.text, wanted.prompt_tokens)


def test_options(create: Any, llava: Llava) -> None:
    got = create(input="Hello", temperature=1.5, top_p=0.9, max_output_tokens=16, extra_body={"seed": 7, "top_k": 50})
    wanted = llava.ask("Hello", [], Options(max_tokens=16, temperature=1.5, top_p=0.9, top_k=50, seed=7))
    assert (got.output_text, got.temperature, got.top_p) == (wanted.text, 1.5, 0.9)
    assert got.max_output_tokens == 16
    assert create(input="Hello", extra_body={"max_tokens": 3}).max_output_tokens == 3


def test_schemas(create: Any) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"]}
    form = {"type": "json_schema", "name": "number", "schema": schema, "strict": True}
    answer = create(input="Hello", text={"format": form, "verbosity": "medium"}, max_output_tokens=64)
    assert json.loads(answer.output_text)["n"] <= 9
    assert (answer.status, answer.incomplete_details, answer.text.format.type) == ("completed", None, "json_schema")
    assert create(input="Hello", text={"format": {"type": "json_object"}}, max_output_tokens=4).output_text[0] == "{"
    assert create(input="Hello", text={"format": {"type": "text"}}, max_output_tokens=4).output_text


def test_log_probabilities(create: Any, llava: Llava) -> None:
    wanted: list[Any] = []
    for chunk in llava.answer([Message("user", "Hello")], [], Options(max_tokens=8, top_logprobs=2)):
        wanted += chunk.chances
    for more, count in (({"top_logprobs": 2}, 2), ({"include": ["message.output_text.logprobs"]}, 0)):
        got = create(input="Hello", max_output_tokens=8, **more).output[0].content[0].logprobs
        assert [chance.logprob for chance in got] == [chance.logprob for chance in wanted]
        assert [len(chance.top_logprobs) for chance in got] == [count] * 8
    other = create(input="Hello", max_output_tokens=8, include=["reasoning.encrypted_content"])
    assert other.output[0].content[0].logprobs == []


def test_cached_tokens(create: Any) -> None:
    """Those before the first difference between two prompts, where whole pictures or texts end."""
    first, second, other = (
        create(input=[user(text, png("teal"))], max_output_tokens=2).usage
        for text in ("What is it?", "What colour is it?", "What is it?")
    )
    assert first.input_tokens_details.cached_tokens == 0
    for usage in (second, other):
        details = usage.input_tokens_details
        assert 0 < details.cached_tokens < usage.input_tokens == details.cached_tokens + details.cache_write_tokens


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"instructions": [1]}, "instructions"),
        ({"include": "logprobs"}, "include"),
        ({"text": "json"}, "text"),
        ({"text": {"verbosity": "low"}}, "verbosity"),
        ({"metadata": {"a": "b" * (1 << 20)}}, "metadata"),
        ({"text": {"more": "b" * (1 << 20)}}, "metadata"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "json_schema": {"schema": {}}}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "text.format"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 30}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [3]}, "input[0]"),
        ({"input": [{"role": "assistant", "content": "Hello"}]}, "input"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input[0].type"),
        ({"input": [{"role": "tool", "content": "4"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": ["a"]}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": [{"type": ["input_text"], "text": "a"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": ["a"]}]}, "input[0].content[0]"),
    ],
)
def test_what_cannot_be_done_is_refused(server: Server, fields: dict[str, Any], param: str) -> None:
    status, error = refusal(server, **fields)
    assert (status, error["param"]) == (400, param)


def test_a_reference_to_what_was_answered_is_refused_with_advice(server: Server) -> None:
    items = [{"role": "user", "content": "Hello"}, {"type": "item_reference", "id": "msg_1"}]
    status, error = refusal(server, input=items)
    assert (status, error["param"]) == (400, "input[1].type")
    assert "store to false" in error["message"]


def test_another_model_is_refused(server: Server) -> None:
    status, error = refusal(server, model="gpt-5")
    assert (status, error["code"]) == (404, "model_not_found")


def test_a_stream_ends_with_an_error_if_the_model_dies(create: Any, server: Server) -> None:
    stream = create(input="Hello", stream=True, max_output_tokens=100_000)
    while next(stream).type != "response.output_text.delta":
        pass
    os.kill(server.child(), signal.SIGKILL)
    with pytest.raises(openai.APIError, match="ended while it worked"):
        list(stream)
    server.wait_until(lambda: server.health()["status"] == "ok")
