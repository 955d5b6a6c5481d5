"""Grammars that an answer follows: llama.cpp's, and those of LLGuidance, which JSON schemas become."""

from __future__ import annotations

import json
import os
import re
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_edge import Llava, Options
from llava_edge.errors import BundleError, UsageError
from llava_edge.json_schema.grammar import from_schema
from llava_edge.runtimes import constraints, sampling
from llava_edge.runtimes.sampling import Sampler
from llava_edge.runtimes.vocabulary import Vocabulary

COLOURS = """%llguidance {}
start: " "? colour (", " colour){1,2}
colour: "red" | "blue" | /gr[ae]y/
"""


def test_the_grammar_counts(llava: Llava) -> None:
    """Without it the same draw is something else."""
    free = Options(temperature=3.0, seed=0, max_tokens=20)
    assert llava.ask("?", options=free).text not in ("yes", "no")
    assert llava.ask("?", options=replace(free, grammar='root ::= "yes" | "no"')).text in ("yes", "no")
    named = 'root ::= "%llguidance {}"'
    assert llava.ask("?", options=Options(grammar=named, max_tokens=20)).text == "%llguidance {}"
    colours = llava.ask("?", options=replace(free, grammar=COLOURS, max_tokens=40)).text.split(", ")
    assert set(colours) <= {"red", "blue", "gray", "grey"}
    assert len(colours) in (2, 3)
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(llava.ask("?", options=free).text)


@pytest.mark.parametrize("grammar", ['root ::= "<|im_start|>"', '%llguidance {}\nstart: "<|im_start|>"'])
def test_no_control_token_stands_for_its_name(grammar: str, llava: Llava) -> None:
    for seed in range(12):
        options = Options(grammar=grammar, temperature=3.0, seed=seed, max_tokens=20)
        assert llava.ask("?", options=options).text == "<|im_start|>"


def test_lark_may_name_the_token_that_ends_an_answer_but_no_other_without_text(llava: Llava) -> None:
    ended = llava.ask("?", options=Options(grammar='%llguidance {}\nstart: "yes" <|im_end|> "no"', max_tokens=20))
    assert (ended.text, ended.finish_reason) == ("yes", "stop")
    for name in ("<|im_start|>", "<[1]>"):
        with pytest.raises(UsageError, match="no token that the grammar, or JSON schema, allows"):
            llava.ask("?", options=Options(grammar=f'%llguidance {{}}\nstart: "yes" {name}', max_tokens=20))


@pytest.mark.parametrize("expression", [r"/[\xff]/", r"/a[\xff]b/"])
def test_a_byte_that_llguidance_cannot_write_is_said_in_our_words(expression: str, llava: Llava) -> None:
    grammar = f'%llguidance {{"allow_invalid_utf8": true}}\nstart: {expression}'
    with pytest.raises(UsageError, match="no token that the grammar, or JSON schema, allows"):
        llava.ask("?", options=Options(grammar=grammar, max_tokens=20))
    assert llava.ask("?", options=Options(grammar='root ::= "yes"', max_tokens=8)).text == "yes"


@pytest.mark.parametrize("change", [{}, {"repeat_penalty": 2.0, "presence_penalty": 1.5}], ids=["plain", "penalties"])
def test_both_kinds_of_grammars_allow_the_same(change: dict[str, float], llava: Llava) -> None:
    options = Options(max_tokens=24, **change)  # type: ignore[arg-type]
    for gbnf, lark in (("[a-h ]{20}", "/[a-h ]{20}/"), ('"é"{3} | "No" [a-y]{9}', "/é{3}|No[a-y]{9}/")):
        answers = [
            llava.ask("?", options=replace(options, grammar=grammar)).text
            for grammar in (f"root ::= {gbnf}", f"%llguidance {{}}\nstart: {lark}")
        ]
        assert answers[0] == answers[1] != ""
    language = llava._engine.model.language
    every = np.arange(language.vocabulary.size)
    for gbnf, lark in (("[a-h ]*", "/[a-h ]*/"), ('"é"?', '"é"?')):
        masks = []
        for grammar in (f"root ::= {gbnf}", f"%llguidance {{}}\nstart: {lark}"):
            with closing(constraints.constraint(language.library, language.vocabulary, grammar)) as followed:
                masks.append(followed.allowed(every))
        assert np.array_equal(masks[0], masks[1])
        assert 1 < masks[0].sum() < len(every) / 2


def test_limits_that_leave_the_likeliest_leave_the_one_that_the_grammar_allows(llava: Llava) -> None:
    for grammar in ("", "root ::= [^a-s\\x00]{40}"):
        greedy = Options(grammar=grammar, max_tokens=20, speculate="off")
        wanted = llava.ask("?", options=greedy).text
        for change in ({"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}):
            options = replace(greedy, temperature=3.0, seed=1, **change)
            assert llava.ask("?", options=options).text == wanted, (grammar, change)


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        ('root ::= "x', "llama.cpp cannot parse the grammar (unexpected end of input); expected GBNF"),
        ("root ::= (", "llama.cpp cannot parse the grammar (expecting ')'); expected GBNF"),
        ("root ::= " + "a" * 999, "llama.cpp cannot parse the grammar (Undefined rule identifier 'a"),
        ("# nothing", "llama.cpp cannot parse the grammar"),
        ('root ::= "\ud83d', "llama.cpp cannot parse the grammar"),
        ('root ::= root | "x"', "grammar"),
        ('root ::= "x"{3000}', "please reduce the number of repetitions"),
        ('root ::= "x"\0 | "y"', "The grammar contains a NUL character."),
        ("%llguidance {}\nstart: <|none|>", "unknown special token"),
        ('%llguidance {}\nstart: "x', "LLGuidance cannot follow the grammar, or JSON schema: "),
        ('%llguidance {}\nstart: "\ud83d"', "LLGuidance cannot follow the grammar, or JSON schema: "),
        ("%llguidance {}\nstart: none", "LLGuidance cannot follow the grammar, or JSON schema: "),
        ("%llguidance {}\nstart: " + "a" * 999, "LLGuidance cannot follow the grammar, or JSON schema: "),
    ],
)
def test_an_unreadable_grammar_costs_no_picture(
    grammar: str, says: str, llava: Llava, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(llava._engine.model.scheduler, "_prefill", None)
    with pytest.raises(UsageError, match=re.escape(says)) as error:
        llava.ask("?", Image.new("RGB", (8, 8)), Options(grammar=grammar, max_tokens=4))
    assert re.fullmatch(".{30,300}", str(error.value))  # in one line
    assert "()" not in str(error.value)
    monkeypatch.undo()
    assert llava.ask("?", options=Options(max_tokens=2)).text
    assert capfd.readouterr() == ("", "")


def test_what_others_say_while_a_grammar_is_read_is_not_lost(
    llava: Llava, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    library = llava._engine.model.language.library
    parse = library.llama_sampler_init_grammar
    monkeypatch.setattr(library, "llama_sampler_init_grammar", lambda *of: (os.write(2, b"hello"), parse(*of))[1])
    assert llava.ask("?", options=Options(grammar='root ::= "yes"', max_tokens=8)).text == "yes"
    assert "hello" in capfd.readouterr().err


@pytest.mark.parametrize("grammar", ['root ::= "\\x04"', from_schema({"enum": ["\U00050000"]})], ids=["byte", "schema"])
def test_a_grammar_that_no_token_continues_is_refused(grammar: str, llava: Llava, monkeypatch: Any) -> None:
    """llama.cpp would end the process. The vocabulary here can say all; so its words are taken away."""
    for kind in (constraints.GbnfConstraint, constraints.LarkConstraint):
        monkeypatch.setattr(kind, "allowed", lambda _, ids: np.zeros(len(ids), np.bool_))
    with pytest.raises(UsageError, match="no token that the grammar, or JSON schema, allows"):
        llava.ask("?", options=Options(grammar=grammar, max_tokens=4))
    monkeypatch.undo()
    assert llava.ask("?", options=Options(grammar='root ::= "yes"', max_tokens=8)).text == "yes"


@pytest.mark.parametrize("change", [{}, {"temperature": 1.0, "seed": 1}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("grammar", ["root ::= [a-h ]{20}", "root ::= [^\\x00]{20}", from_schema({"type": "object"})])
def test_unlikely_tokens_are_looked_at_only_if_needed(
    grammar: str, change: dict[str, Any], llava: Llava, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look at all of them takes as long as a small model takes for a token. The answer is the same."""
    answers, looks, real = [], [], Sampler._allowed
    shown = list[int]()

    def noticed(self: Sampler, constraint: Any, ids: Any) -> Any:
        shown.append(len(ids))
        return real(self, constraint, ids)

    monkeypatch.setattr(Sampler, "_allowed", noticed)
    for most in (0, 1, 64):
        monkeypatch.setattr(sampling, "CANDIDATES", most)
        answers.append(llava.ask("?", options=Options(grammar=grammar, max_tokens=24, **change)).text)
        looks.append(sum(shown))
        shown.clear()
    assert answers[0] == answers[1] == answers[2]
    assert looks[2] < looks[0] / 2 or change or not grammar.startswith("root ::= [^")


def test_deep_parentheses_are_refused_before_llama_cpp_reads_them(llava: Llava) -> None:
    with pytest.raises(UsageError, match="nested deeper than 200 levels"):
        llava.ask("?", options=Options(grammar=f'root ::= {"(" * 30_000}"x"{")" * 30_000}'))
    for comment in ('# "\n', "# [\n", "#\r"):  # in it, no string and no character class begins
        with pytest.raises(UsageError, match="nested deeper than 200 levels"):
            llava.ask("?", options=Options(grammar=f'{comment}root ::= {"(" * 30_000}"x"{")" * 30_000} # "]'))
    with pytest.raises(UsageError, match="nested deeper than 200 levels"):
        llava.ask("?", options=Options(grammar=f'root ::= {"(" * 201}"x"{")" * 201}'))
    deepest = f'root ::= ("x"){"(" * 200}"y"{")" * 200}'
    assert llava.ask("?", options=Options(grammar=deepest, max_tokens=8)).text == "xy"
    quoted = f'root ::= "\\"{"(" * 300}" [\\]{"(" * 300}] # {"(" * 300}'
    assert llava.ask("?", options=Options(grammar=quoted, max_tokens=400)).text.strip('(]"') == ""


def test_what_can_be_read_in_too_many_ways_ends(
    llava: Llava, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each bracket doubles them, and llama.cpp follows all: minutes for the fifteenth."""
    monkeypatch.setattr(constraints, "MAX_ACCEPT_SECONDS", 0.05)
    gbnf = 'root ::= list\nlist ::= "[" list ("," list)* "]" | "[" list "," list ("," list)* "]"'
    inner = {"type": "array", "minItems": 1, "items": {"$ref": "#"}}
    schema = from_schema({"anyOf": [inner, {**inner, "minItems": 2}]})
    for grammar, count in ((gbnf, 13), (schema, 60)):
        with pytest.raises(UsageError, match=r"too many ways|Too many items"):
            llava.ask("?", options=Options(grammar=grammar, max_tokens=count))
    assert capfd.readouterr() == ("", "")
    assert llava.ask("?", options=Options(grammar='root ::= "yes"', max_tokens=8)).text == "yes"


def test_a_vocabulary_without_an_end_is_named(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = llava._engine.model.language.vocabulary
    monkeypatch.setattr(Vocabulary, "is_end_token", lambda *_: False)
    other = Vocabulary(vocabulary._library, llava._engine.model.language._model, vocabulary._path)
    with pytest.raises(BundleError, match="no token that ends an answer"):
        _ = other.for_llguidance
    monkeypatch.setattr(Vocabulary, "is_end_token", lambda *_: True)
    library, unknown = vocabulary._library, vocabulary._library.LLAMA_TOKEN_ATTR_UNKNOWN
    monkeypatch.setattr(library, "llama_vocab_get_attr", lambda _, token: unknown * (token == 98))
    monkeypatch.setattr(library, "llama_vocab_eos", lambda _: 99)  # which the file does not mark
    other = Vocabulary(library, llava._engine.model.language._model, vocabulary._path)
    assert other._without_bytes == [98, 99]
    assert np.ones(100)[other.textless_tokens].size == 0
