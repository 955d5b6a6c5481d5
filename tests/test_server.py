"""The server as programs meet it: the official `openai` client against a real process with the micro model."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pytest
from serving import Server, data_url, image_question, paused, png, question, read_all, running

from llava_edge import Llava, Options
from llava_edge.options import result_of
from llava_edge.prompt import Message
from llava_edge.server.metrics import Metrics
from llava_edge.server.serve import _listening_socket

openai = pytest.importorskip("openai", reason="the openai client is not installed")

BEGUN = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "The sk"}]
WHOLE = 'llava_edge_answers_total{reason="length"}'


@pytest.fixture(scope="module")
def server(micro_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(micro_bundle, tmp_path_factory.mktemp("server"), "--host", "localhost") as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def create(client: Any) -> Any:
    return partial(client.chat.completions.create, model="micro")


def user(text: str, *pictures: bytes) -> dict[str, Any]:
    message: dict[str, Any] = question(text, pictures)["messages"][0]
    return message


def test_an_answer_is_the_librarys_answer(create: Any, llava: Llava) -> None:
    red, blue = png("red"), png("blue")
    for text, pictures in (("What?", []), ("What colour?", [red]), ("What colour?", [red, blue]), ("", [red])):
        wanted = llava.ask(text, pictures, Options(max_tokens=16))
        got = create(messages=[user(text, *pictures)], max_tokens=16)
        assert got.choices[0].message.content == wanted.text
        assert got.choices[0].finish_reason == wanted.finish_reason
        assert got.usage.prompt_tokens == wanted.prompt_tokens
        assert got.usage.completion_tokens == wanted.completion_tokens
        assert got.usage.total_tokens == wanted.prompt_tokens + wanted.completion_tokens


def test_pictures_make_a_difference(server: Server) -> None:
    def answer(colour: str) -> Any:
        return server.ask("Colour?", (png(colour),), logprobs=True)["choices"][0]["logprobs"]["content"][0]["logprob"]

    assert answer("red") != answer("blue")


def test_the_stream_is_the_answer(create: Any) -> None:
    messages = [user("Tell me about it.", png())]
    whole = create(messages=messages, max_tokens=24)
    events = list(create(messages=messages, max_tokens=24, stream=True, stream_options={"include_usage": True}))
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(e.choices[0].delta.content or "" for e in events[:-1]) == whole.choices[0].message.content
    assert [e.choices[0].finish_reason for e in events[:-1]] == [None] * (len(events) - 2) + ["length"]
    assert events[-1].usage == whole.usage
    assert len({e.id for e in events}) == 1


def test_a_proxy_shall_not_hold_a_stream_back(server: Server) -> None:
    """nginx collects an answer before it passes it on, unless this header is there (ngx_http_proxy_module)."""
    status, headers, _ = server.chat(question(stream=True))
    assert (status, headers["x-accel-buffering"]) == (200, "no")


def test_a_conversation(create: Any, llava: Llava) -> None:
    chat = llava.chat(system="Be kind.", options=Options(max_tokens=12))
    turns: list[dict[str, Any]] = [{"role": "system", "content": "Be kind."}]
    for text, pictures in (("What is it?", [png()]), ("And this?", [png("blue")]), ("Why?", [])):
        turns.append(user(text, *pictures))
        answer = create(messages=turns, max_tokens=12).choices[0].message.content
        turns.append({"role": "assistant", "content": answer})
        assert answer == "".join(chunk.text for chunk in chat.say(text, pictures))


def test_an_answer_that_was_begun_is_gone_on_with(server: Server, llava: Llava) -> None:
    messages = [Message("user", "Hello"), Message("assistant", "The sk")]
    wanted = result_of(llava.answer(messages, (), Options(max_tokens=16)))
    said_so = server.ask(messages=BEGUN, continue_final_message=True, add_generation_prompt=False)
    for got in (server.ask(messages=BEGUN), said_so):
        assert got["choices"][0]["message"]["content"] == wanted.text
        assert got["usage"]["prompt_tokens"] == wanted.prompt_tokens


def test_stop_seed_temperature(create: Any) -> None:
    def answer(**options: Any) -> str:
        made = create(messages=[user("Hello")], max_tokens=24, **options)
        assert made.choices[0].finish_reason in ("stop", "length")
        text = made.choices[0].message.content
        assert isinstance(text, str)
        return text

    whole = answer()
    middle = whole[len(whole) // 2 :][:3]
    assert answer(stop=middle) == whole[: whole.find(middle)]
    assert answer(stop=["never there", middle]) == whole[: whole.find(middle)]
    assert answer(temperature=1.0, seed=1) == answer(temperature=1.0, seed=1)
    assert len({answer(temperature=1.0, seed=seed) for seed in range(4)}) > 1
    assert len({answer(temperature=1.0) for _ in range(4)}) > 1  # drawn anew where no seed is given
    assert len({answer(temperature=1.0, seed=-1) for _ in range(4)}) > 1
    for seed in (1 - (1 << 63), (1 << 63) - 1):
        assert answer(temperature=1.0, seed=seed) == answer(temperature=1.0, seed=seed)
    assert answer(temperature=5.0, top_p=1e-6) == answer(temperature=5.0, top_p=0) == whole


def test_what_a_draw_is_limited_by(create: Any) -> None:
    def answers(**limits: float) -> set[str]:
        made = [
            create(messages=[user("Hello")], max_tokens=12, temperature=5.0, seed=seed, extra_body=limits)
            for seed in range(4)
        ]
        return {each.choices[0].message.content for each in made}

    assert len(answers()) == len(answers(top_k=-1, min_p=0.0)) == 4
    greedy = create(messages=[user("Hello")], max_tokens=12)
    assert answers(top_k=1) == answers(min_p=1.0) == {greedy.choices[0].message.content}


def test_penalties(server: Server, llava: Llava) -> None:
    def wanted(**penalties: float) -> str:
        return llava.ask("Hello", options=Options(max_tokens=60, **penalties)).text  # type: ignore[arg-type]

    for name in ("repeat_penalty", "repetition_penalty"):
        assert server.text("Hello", max_tokens=60, **{name: 1.3}) == wanted(repeat_penalty=1.3) != wanted()
    both = {"frequency_penalty": 0.4, "presence_penalty": 1}
    assert server.text("Hello", max_tokens=60, **both) == wanted(**both) != wanted()


def test_fewer_positions_for_a_picture(server: Server) -> None:
    whole, less = (server.ask("?", (png(),), image_tokens=count)["usage"]["prompt_tokens"] for count in (0, 3))
    assert whole > less


def test_json_schema(create: Any) -> None:
    """Whatever a random model wants to say, it is this JSON."""
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "sure": {"type": "boolean"}},
        "required": ["colour", "sure"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    for seed in range(5):
        made = create(messages=[user("?", png())], response_format=wanted, temperature=2.0, seed=seed, max_tokens=64)
        value = json.loads(made.choices[0].message.content)
        assert made.choices[0].finish_reason == "stop"
        assert set(value) == {"colour", "sure"}
        assert value["colour"] in ("red", "blue")
        assert isinstance(value["sure"], bool)


def test_a_pydantic_model(client: Any) -> None:
    """As the client turns a class into a schema: with titles, definitions and references."""
    pydantic = pytest.importorskip("pydantic", reason="the openai client has no pydantic")
    part = pydantic.create_model("Part", colour=(Literal["red", "blue"], ...))
    whole = pydantic.create_model("Picture", sure=(bool, ...), parts=(list[part], ...))  # type: ignore[valid-type]
    made = client.chat.completions.parse(
        model="micro", messages=[user("?", png())], response_format=whole, temperature=1.0, seed=1, max_tokens=400
    )
    assert isinstance(made.choices[0].message.parsed, whole)


def test_json_object(server: Server) -> None:
    text = server.text("?", response_format={"type": "json_object"}, temperature=1.0, seed=3, max_tokens=12)
    assert text.startswith("{")
    assert not server.text("?", temperature=1.0, seed=3, max_tokens=12).startswith("{")


def test_logprobs(create: Any) -> None:
    made = create(messages=[user("Hello")], max_tokens=8, logprobs=True, top_logprobs=3)
    tokens = made.choices[0].logprobs.content
    assert len(tokens) == made.usage.completion_tokens
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob < 0  # greedy: the best of them
    said = b"".join(bytes(token.bytes) for token in tokens).decode("utf-8", "replace")
    assert said.lstrip().startswith(made.choices[0].message.content)


def test_completions(client: Any, llava: Llava) -> None:
    made = client.completions.create(model="micro", prompt="Hello", max_tokens=8)
    assert made.choices[0].text == llava.ask("Hello", options=Options(max_tokens=8)).text
    assert client.completions.create(model="micro", prompt="Hello").usage.completion_tokens == 16  # OpenAI's default
    with pytest.raises(openai.BadRequestError, match=r"logprobs is 99") as caught:
        client.completions.create(model="micro", prompt="Hello", logprobs=99)
    assert caught.value.param == "logprobs"
    for prompt in ("word " * 5000, "x" * 2_000_000):  # more than the context holds, and than is accepted at all
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="micro", prompt=prompt)
        assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")
    with pytest.raises(openai.BadRequestError, match="one string"):
        client.completions.create(model="micro", prompt=["Hello", "Hi"])
    parts = client.completions.create(model="micro", prompt="Hello", max_tokens=8, stream=True)
    assert "".join(part.choices[0].text for part in parts) == made.choices[0].text


def test_models_and_health(client: Any, server: Server) -> None:
    assert [model.id for model in client.models.list()] == ["micro"]
    assert client.models.retrieve("micro").id == "micro"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert server.health()["status"] == "ok"


@pytest.mark.parametrize(
    ("route", "field"), [("chat/completions", "messages"), ("completions", "prompt"), ("responses", "input")]
)
def test_the_name_that_ollamas_list_has_is_the_models(route: str, field: str, server: Server) -> None:
    """LibreChat, among others, lists the models by /api/tags and then asks under /v1."""
    name = json.loads(server.request("GET", "/api/tags")[2])["models"][0]["name"]
    assert name == "micro:latest"
    body = {field: [user("Hello")] if field == "messages" else "Hello", "max_tokens": 1}
    assert server.request("POST", f"/v1/{route}", {**body, "model": name})[0] == 200
    assert server.request("POST", f"/v1/{route}", {**body, "model": "micro:7b"})[0] == 404
    assert json.loads(server.request("GET", f"/v1/models/{name}")[2])["id"] == "micro"


def test_metrics_count(server: Server) -> None:
    tokens, seconds = 'llava_edge_tokens_total{kind="answer"}', 'llava_edge_stage_seconds_total{stage="total"}'
    server.ask("Hello")
    before = server.metric(tokens), server.metric(seconds)
    made = server.ask("Hello")
    assert server.metric(tokens) == before[0] + made["usage"]["completion_tokens"]
    assert server.metric(seconds) - before[1] == pytest.approx(made["llava_edge"]["timings"]["total_ms"] / 1000)
    for line in server.request("GET", "/metrics")[2].decode().splitlines():
        assert line.startswith("# ") or len(line.split()) == 2


def test_a_large_counter_still_counts() -> None:
    metrics, none = Metrics(), dict.fromkeys(("prompt_tokens", "image_tokens"), 0)
    for tokens in (1_234_567, 1):
        times = defaultdict[str, float](float)
        metrics.count_answer({"finish_reason": "stop", "completion_tokens": tokens, "timings": times, **none})
    assert 'tokens_total{kind="answer"} 1234568\n' in metrics.render()


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "gpt-4o"}, 404, "model"),
        ({"model": 5}, 400, "model"),
        ({"max_tokens": None, "max_completion_tokens": 0}, 400, "max_completion_tokens"),
        ({"messages": []}, 400, "messages"),
        ({"messages": "hi"}, 400, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, 400, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 400, "messages[0].content[0]"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "messages"),
        ({"messages": [user("a"), user("b", png()) | {"role": "assistant"}]}, 400, "messages[1].content"),
        ({"messages": [{"role": "assistant", "content": "x"}, user("a")]}, 400, "messages"),
        ({"messages": BEGUN, "continue_final_message": False}, 400, "continue_final_message"),
        ({"continue_final_message": True}, 400, "continue_final_message"),
        ({"add_generation_prompt": False}, 400, "add_generation_prompt"),
        ({"messages": [user("a", *[png()] * 9)]}, 400, "messages"),
        ({"messages": [user("a", png()), {"role": "assistant", "content": "b"}, user(" \n")]}, 400, "messages"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"n_predict": -2, "max_tokens": None}, 400, "n_predict"),
        ({"max_tokens": "5"}, 400, "max_tokens"),
        ({"max_tokens": 1e308}, 400, "max_tokens"),
        ({"max_tokens": 20.5}, 400, "max_tokens"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"top_p": 2}, 400, "top_p"),
        ({"seed": 1.5}, 400, "seed"),
        ({"seed": 1 << 63}, 400, "seed"),
        ({"stop": 3}, 400, "stop"),
        ({"stop": ["x"] * 17}, 400, "stop"),
        ({"stop": ["x" * 257]}, 400, "stop"),
        ({"n": 2}, 400, "n"),
        ({"n": True}, 400, "n"),
        ({"stream": "yes"}, 400, "stream"),
        ({"logit_bias": {"1": 5}}, 400, "logit_bias"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"": "none", "n": 2}, 400, "n"),
        ({"top_k": -2}, 400, "top_k"),
        ({"min_p": 2}, 400, "min_p"),
        ({"repeat_penalty": 0}, 400, "repeat_penalty"),
        ({"repetition_penalty": 11}, 400, "repetition_penalty"),
        ({"frequency_penalty": 3}, 400, "frequency_penalty"),
        ({"presence_penalty": "x"}, 400, "presence_penalty"),
        ({"image_tokens": -1}, 400, "image_tokens"),
        ({"image_tokens": 1000}, 400, "image_tokens"),
        ({"json_schema": {"type": "string", "pattern": "(?=a)"}}, 400, "json_schema"),
        ({"json_schema": {}, "response_format": {"type": "json_object"}}, 400, "json_schema"),
        ({"grammar": 'root ::= "x"'}, 400, "grammar"),
        ({"guided_choice": ["a", "b"]}, 400, "guided_choice"),
        ({"guided_json": {}}, 400, "guided_json"),
        ({"structured_outputs": {"choice": ["a"]}}, 400, "structured_outputs"),
        ({"mirostat": 2}, 400, "mirostat"),
        ({"ignore_eos": True}, 400, "ignore_eos"),
        ({"ignore_eos": 0}, 400, "ignore_eos"),
        ({"repeat_last_n": 256}, 400, "repeat_last_n"),
        ({"dry_multiplier": 0.8}, 400, "dry_multiplier"),
        ({"samplers": ["top_k"]}, 400, "samplers"),
        ({"skip_special_tokens": False}, 400, "skip_special_tokens"),
        ({"min_tokens": 5}, 400, "min_tokens"),
        ({"bad_words": ["red"]}, 400, "bad_words"),
        ({"messages": [user("a") | {"images": ["aGk="]}]}, 400, "messages[0].images"),
        ({"top_logprobs": 2}, 400, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 99}, 400, "top_logprobs"),
        ({"response_format": {"type": "xml"}}, 400, "response_format"),
        ({"messages": [user("x " * 5000)]}, 400, "messages"),
        ({"messages": [user("a", b"no picture")]}, 400, "messages"),
        ({"messages": [user("a", png()[:-20])]}, 400, "messages"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_named(change: dict[str, Any], status: int, param: str, server: Server) -> None:
    for stream in (False, True):
        body = {"stream": stream, **question("Hello"), **change}
        got, _, answer = server.chat(body)
        error = json.loads(answer)["error"]
        assert (got, error["param"]) == (status, param), error
        assert set(error) == {"message", "type", "param", "code"}
        assert "/" not in error["message"].replace("data:image/", "").replace("and/or", "")
        assert "Traceback" not in error["message"]
    assert server.health()["crashes"] == 0


# What OpenAI's client 2 declares and changes an answer, for all three and for each. Newer clients may declare more.
FIELDS = "model stream_options temperature top_p"
SAMPLED = "frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop"
TOOLS = "tool_choice tools top_logprobs"
CHAT = "function_call functions max_completion_tokens messages modalities response_format verbosity web_search_options"
RESPONSES = "background conversation input instructions max_output_tokens previous_response_id prompt text"


@pytest.mark.parametrize(
    ("route", "needed", "fields"),
    [
        ("chat/completions", "messages", f"{FIELDS} {SAMPLED} {TOOLS} {CHAT}"),
        ("completions", "prompt", f"{FIELDS} {SAMPLED} best_of echo prompt suffix"),
        ("responses", "input", f"{FIELDS} {TOOLS} {RESPONSES}"),
    ],
)
def test_what_the_client_may_send_is_followed_or_refused(route: str, needed: str, fields: str, server: Server) -> None:
    """Nothing that would change the answer is ignored: a list of numbers is wrong for whatever is followed."""
    body = {needed: [user("Hello")] if needed == "messages" else "Hello"}
    for name in fields.split():
        status, _, answer = server.request("POST", f"/v1/{route}", {**body, name: [1]})
        param = json.loads(answer)["error"]["param"] if status != 200 else None
        assert (status, str(param).partition("[")[0]) == (400, name)


def test_errors_as_the_client_raises_them(create: Any) -> None:
    def error(kind: Any, **change: Any) -> Any:
        with pytest.raises(kind) as caught:
            create(**{"messages": [user("Hello")], **change})
        return caught.value

    assert error(openai.BadRequestError, messages=[user("x " * 5000)]).code == "context_length_exceeded"
    assert error(openai.BadRequestError, temperature=-1, stream=True).param == "temperature"
    assert error(openai.NotFoundError, model="gpt-4o").code == "model_not_found"
    messages = image_question({"url": "https://example.com/x.png"})["messages"]
    assert "nothing is downloaded" in error(openai.BadRequestError, messages=messages).message


def test_who_uses_tools_for_structured_answers_is_told_of_schemas(create: Any) -> None:
    tool = {"type": "function", "function": {"name": "answer", "parameters": SCHEMA}}
    choice = {"type": "function", "function": {"name": "answer"}}
    for change in ({"tools": [tool], "tool_choice": choice}, {"tools": [tool]}, {"tool_choice": "required"}):
        with pytest.raises(openai.BadRequestError, match="use a JSON schema if it is for structured answers"):
            create(messages=[user("Hello")], **change)


def test_who_sends_a_schema_in_a_field_of_vllm_is_told_where_it_belongs(create: Any) -> None:
    for change in ({"guided_json": SCHEMA}, {"structured_outputs": {"json": SCHEMA}}):
        with pytest.raises(openai.BadRequestError, match="use response_format with a JSON schema"):
            create(messages=[user("Hello")], extra_body=change)
    create(messages=[user("Hello")], response_format={"type": "json_schema", "json_schema": {"schema": SCHEMA}})


def test_a_client_that_was_given_the_address_without_v1_is_told(server: Server) -> None:
    status, _, body = server.request("POST", "/chat/completions", question())
    assert (status, b"under /v1" in body) == (404, True)


def test_the_asynchronous_client(server: Server) -> None:
    """Answers, and cancelling a task leaves the model to the next one."""

    async def run() -> str:
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none") as client:
            create = partial(client.chat.completions.create, model="micro")
            with paused(server):
                task = asyncio.create_task(create(messages=[user("Hello")], max_tokens=480))
                while server.metric("llava_edge_requests_in_work") == 1:
                    await asyncio.sleep(0.01)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                server.wait_until(lambda: server.metric("llava_edge_requests_in_work") == 1)
            made = await create(messages=[user("Hello")], max_tokens=8)
            return str(made.choices[0].message.content)

    alone = server.text("Hello", max_tokens=8)
    before = server.metric(WHOLE)
    assert asyncio.run(run()) == alone
    assert server.metric(WHOLE) == before + 1  # the one that was cancelled did not run to its end


def test_unknown_fields_are_ignored(server: Server) -> None:
    assert server.text("Hello", user="me", metadata={"a": 1}, n=1, tools=[]) == server.text("Hello")


def test_pixels_are_counted_over_all_images(server: Server) -> None:
    large = png(size=(6000, 5000))
    assert server.chat(question("?", (large,)))[0] == 200
    status, _, body = server.chat(question("?", (large, large)))
    assert (status, b"pixels" in body) == (400, True)
    assert server.chat(question("?", (png(),) * 8))[0] == 200  # as many as are accepted


def test_the_library_and_the_page_are_served_at_once(server: Server) -> None:
    """Requests of every kind get their answer while the model works."""
    with paused(server):
        busy = server.start(question("Hello"))
        server.wait_until(lambda: server.metric("llava_edge_requests_in_work") == 2)
        assert server.request("GET", "/", timeout=2)[0] == 200
        assert server.request("GET", "/health", timeout=2)[0] == 200
    assert read_all(busy).startswith(b"HTTP/1.1 200 ")


def test_the_bytes_decide_not_their_label(server: Server) -> None:
    def status(address: str) -> int:
        return server.chat(image_question({"url": address}))[0]

    assert status(data_url(png(), "jpeg")) == 200
    assert status("data:image/jpeg;base64,AAAA") == 400
    content = data_url(png()).partition(",")[2]
    lines = base64.encodebytes(png()).decode()
    for label in ("image/png;charset=utf-8;base64", "image/png; base64", "image/*;base64", "image/pjpeg;base64"):
        assert status(f"data:{label},{content}") == 200, label
    assert status(f"data:application/octet-stream;name=a.png;base64,{lines}") == 200
    assert status(f"data:;base64,{base64.urlsafe_b64encode(png()).decode().rstrip('=')}") == 200


@pytest.mark.parametrize(
    ("label", "says"),
    [
        (
            "image/heic",
            "An image is declared as image/heic, but only JPEG, PNG, WebP, GIF and BMP are supported; convert it",
        ),
        ("image/HEIF", "say by 'heif-convert photo.heic photo.jpg'."),
        ("image/tiff", "but only JPEG, PNG, WebP, GIF and BMP are supported; convert it to one of these."),
        ("image/svg+xml", "declared as image/svg+xml"),
        ("text/html", "only as base64 data: URLs"),
        ("image/<b>", "only as base64 data: URLs"),
    ],
)
def test_a_format_that_is_not_read_is_the_reason(label: str, says: str, server: Server) -> None:
    status, _, answer = server.chat(image_question({"url": f"data:{label};base64,AAAA"}))
    message = json.loads(answer)["error"]["message"]
    assert (status, says in message) == (400, True), message
    assert ("downloaded" in message) == ("base64" in says)


def test_messages_are_brought_into_turns(server: Server) -> None:
    """Clients keep questions whose answers failed, set rules later, and send what called a tool with no content."""

    def answered(*turns: tuple[str, Any]) -> Any:
        messages = [{"role": role, "content": text} for role, text in turns]
        return server.ask(messages=messages, max_tokens=2, logprobs=True)["choices"]

    one = [("system", "Be brief.\nBe kind."), ("user", "Hello\nYou?"), ("assistant", ""), ("user", "Go on")]
    assert one[0][1] != "Be brief."
    expected = answered(*one)
    refusal = [{"type": "refusal", "refusal": ""}]
    for nothing in (None, [], refusal):
        parts = [("user", "Hello"), ("user", "You?"), ("assistant", nothing), ("user", "Go on")]
        assert answered(("system", "Be brief."), *parts, ("developer", "Be kind.")) == expected
    texts = [{"type": "text", "text": text} for text in ("Hello", "You?")]
    assert answered(one[0], ("user", texts), *one[2:]) == expected
    seen, both = (user(text, png())["content"] for text in ("You?", "Hello\nYou?"))
    assert answered(("user", "Hello"), ("user", seen)) == answered(("user", both))
    assert answered(*one[:2]) != answered(*one[1:2])


@pytest.mark.parametrize(
    "more",
    [
        {"tool_choice": "auto"},
        {"tool_choice": "auto", "tools": []},
        {"tool_choice": "none", "tools": [{"type": "function"}]},
        {"function_call": "none", "functions": [{"name": "answer"}]},
        {"stop": ""},
        {"stop": [""]},
        {"logprobs": False, "top_logprobs": 0},
        {"response_format": {"type": "text"}},
        {"top_k": -1, "min_p": 0, "image_tokens": 0, "typical_p": 1.0, "top_n_sigma": -1, "xtc_threshold": 0.1},
        {"repeat_penalty": 1.0, "repeat_last_n": 64, "mirostat": 0, "mirostat_tau": 5.0, "grammar": ""},
        {"repetition_penalty": 1, "ignore_eos": False, "skip_special_tokens": True, "stop_token_ids": []},
        {"bad_words": [], "dry_base": 1.75, "logit_bias": []},
    ],
    ids=str,
)
def test_what_changes_nothing_is_taken(more: dict[str, Any], server: Server) -> None:
    assert server.text("Hello", max_tokens=4, **more) == server.text("Hello", max_tokens=4)


@pytest.mark.parametrize(
    "more",
    [
        {"seed": 7.0, "top_k": 5.0, "temperature": 1.0, "n": 1.0, "image_tokens": 0.0},
        {"logprobs": True, "top_logprobs": 2.0},
        {"json_schema": {"type": "array", "minItems": 2.0, "maxItems": 2.0, "items": {"const": 3.0}}},
    ],
    ids=str,
)
def test_whole_numbers_may_have_a_point(more: dict[str, Any], server: Server) -> None:
    """An integer is a number without a fraction (JSON Schema, Validation 6.1.1), and some proxies write it so."""
    plain = json.loads(json.dumps(more).replace(".0", ""))
    answers = [server.ask("Hello", **{"max_tokens": 8, **plain}), server.ask("Hello", **{"max_tokens": 8.0, **more})]
    assert answers[0]["choices"] == answers[1]["choices"]


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_no_model_is_the_one_there_is(route: str, server: Server) -> None:
    named = {**question("Hello", max_tokens=2), "prompt": "Hello"}
    nameless = {name: value for name, value in named.items() if name != "model"}
    found = []
    for body in (named, nameless, {**nameless, "model": None}, {**nameless, "model": ""}):
        status, _, answer = server.request("POST", route, body)
        said = json.loads(answer)
        found.append((status, said["model"], said["choices"]))
    assert found == [(200, "micro", found[0][2])] * 4


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "n_predict"])
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_an_answer_without_a_limit_fills_the_context(name: str, route: str, server: Server) -> None:
    body = {key: value for key, value in question("Hello").items() if key != "max_tokens"}
    status, _, answer = server.request("POST", route, {**body, "prompt": "Hello", name: -1})
    usage, reason = json.loads(answer)["usage"], json.loads(answer)["choices"][0]["finish_reason"]
    assert (status, reason, usage["total_tokens"]) == (200, "length", server.health()["context"])
    assert usage["completion_tokens"] > 16


@pytest.mark.parametrize(
    "kind", ['application/json; charset="utf-8"', "application/json;charset=utf8", "Application/JSON;"]
)
def test_json_by_its_other_names(kind: str, server: Server) -> None:
    body = json.dumps(question(max_tokens=1)).encode()
    head = server.post.replace(b"application/json", kind.encode()) + b"Connection: close\r\n"
    assert server.raw(head + b"Content-Length: %d\r\n\r\n" % len(body) + body).startswith(b"HTTP/1.1 200 ")


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 3, "maximum": 5}}, "required": ["n"]}


def test_llama_cpps_form_of_a_schema(server: Server) -> None:
    text = server.text("Hello", max_tokens=40, response_format={"type": "json_object", "schema": SCHEMA})
    assert json.loads(text)["n"] in (3, 4, 5)
    assert server.text("Hello", max_tokens=40, json_schema=SCHEMA) == text


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"type": "json_schema"}, "must be an object with a schema"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "must be an object with a schema"),
        ({"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}, "itself"),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "string", "pattern": "(?=a)"}}}, "pattern"),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "object", "required": [{}]}}}, "'required' item"),
    ],
    ids=str,
)
def test_a_response_format_is_refused_for_what_it_is(wanted: Any, says: str, server: Server) -> None:
    status, _, answer = server.chat(question(response_format=wanted))
    error = json.loads(answer)["error"]
    assert (status, error["param"]) == (400, "response_format")
    assert says in error["message"]


# Other clients, by configuration alone.


def run_client(*command: str, **environment: str) -> str:
    """What a program of another package prints; in a process of its own, since these packages are large."""
    done = subprocess.run(
        [sys.executable, *command], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("llm"), reason="the package llm is not installed")
def test_llm(server: Server, tmp_path: Path, root: Path) -> None:
    """With the documented configuration, but for model and port."""
    (tmp_path / "red.png").write_bytes(png())
    settings = (root / "docs/serve.md").read_text("utf-8").partition("```yaml\n")[2].partition("```")[0]
    settings = settings.replace("model_name: smol", "model_name: micro").replace(":8080", f":{server.port}")
    assert "micro" in settings
    (tmp_path / "extra-openai-models.yaml").write_text(settings)
    wanted = server.text("Colour?", (png(),), max_tokens=16).strip()
    command = ["-m", "llm", "prompt", "-m", "smol", "Colour?", "-a", str(tmp_path / "red.png"), "--key", "none"]
    for extra in ([], ["--no-stream"]):
        said = run_client(*command, "-o", "max_tokens", "16", *extra, LLM_USER_PATH=str(tmp_path), PYTHONUTF8="1")
        assert said == wanted


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("litellm"), reason="the package litellm is not installed")
def test_litellm(server: Server) -> None:
    messages = json.dumps(question("Colour?", (png(),))["messages"])
    code = f"""
import json, litellm
to = dict(model="openai/micro", api_base="http://127.0.0.1:{server.port}/v1", api_key="none", max_tokens=16)
messages = json.loads({messages!r})
print(litellm.completion(messages=messages, **to).choices[0].message.content.encode("utf-8").hex())
parts = litellm.completion(messages=messages, stream=True, **to)
print("".join(part.choices[0].delta.content or "" for part in parts).encode("utf-8").hex())
"""
    said = run_client("-c", code, LITELLM_LOCAL_MODEL_COST_MAP="True").split()
    assert said == [server.text("Colour?", (png(),), max_tokens=16).encode().hex()] * 2


def test_what_is_sent_does_not_wait_for_more() -> None:
    """asyncio turns TCP_NODELAY on only for sockets that are named TCP."""
    with closing(_listening_socket("127.0.0.1", 0)) as bound:
        assert bound.proto == socket.IPPROTO_TCP
