"""Speculative decoding: answers are those of plain decoding, whatever is drafted, and whatever a batch computes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llava_edge import Llava, from_schema
from llava_edge.errors import BundleError, UsageError
from llava_edge.options import EngineOptions, Options, Result, Speculate
from llava_edge.runtimes import speculation
from llava_edge.runtimes.draft import DraftModel
from llava_edge.runtimes.language import LanguageModel
from llava_edge.runtimes.speculation import BLOCK, MIN_EQUAL_ROWS, WIDTHS, BitChecks, Costs, NgramLookup

CPU = EngineOptions(device="cpu", threads=1, cache=False)
NEVER = threading.Event()
MODES: tuple[Speculate, Speculate] = ("off", "ngram")
WORDS = ("the", "red", "colour", "of", "a", "list:", "one,", "two,", "three,", "12", "again", "say")


@pytest.fixture(scope="module")
def llava(micro_bundle: Path) -> Iterator[Llava]:
    with Llava.load(micro_bundle, CPU) as loaded:
        yield loaded


@pytest.fixture
def unproven(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> Llava:
    """The model as if just loaded: nothing is known about its batches."""
    engine = llava._engine
    monkeypatch.setattr(engine.model.scheduler._language, "batch_invariant", False)
    engine.model.scheduler._speculation = speculation.Speculation(engine.model.scheduler._language)
    return llava


def ask(llava: Llava, prompt: str, speculate: Speculate, tokens: int = 40, **more: Any) -> Result:
    return llava.ask(prompt, options=Options(max_tokens=tokens, speculate=speculate, **more))


def prompts(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(count)]


def test_100_answers_are_those_of_plain_decoding(unproven: Llava) -> None:
    drafted = accepted = 0
    for prompt in prompts(100):
        plain, speculative = ask(unproven, prompt, "off", 24), ask(unproven, prompt, "ngram", 24)
        assert (speculative.text, speculative.completion_tokens, speculative.finish_reason) == (
            plain.text, plain.completion_tokens, plain.finish_reason)  # fmt: skip
        assert plain.drafted_tokens == 0
        drafted, accepted = drafted + speculative.drafted_tokens, accepted + speculative.accepted_tokens
    assert accepted > 50  # else nothing was tested
    assert drafted - accepted > 50


ITEM = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "count": {"type": "integer"}}}
FORM = from_schema({"type": "array", "items": ITEM | {"required": ["name", "count"]}, "minItems": 2})


@pytest.mark.parametrize("known", [True, False])
def test_answers_of_a_form_are_those_of_plain_decoding(
    known: bool, unproven: Llava, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of properties come again with each item."""
    scheduler = unproven._engine.model.scheduler
    monkeypatch.setattr(scheduler._language, "batch_invariant", known)
    monkeypatch.setattr(scheduler, "_speculation", speculation.Speculation(scheduler._language))
    accepted = 0
    for prompt in prompts(12):
        for grammar in (FORM, 'root ::= ("one, two, three, " | [a-d])*'):
            plain, speculative = (ask(unproven, prompt, how, 90, grammar=grammar) for how in MODES)
            assert (speculative.text, speculative.finish_reason) == (plain.text, plain.finish_reason)
            accepted += speculative.accepted_tokens
    assert accepted > 50


PROMPT = "say the list: one, two,"
ONCE = sum(width - 1 for width in WIDTHS)  # draft tokens, if each width is tried once


def draft_from(monkeypatch: pytest.MonkeyPatch, answer: list[int], wrong: tuple[int, ...] = ()) -> None:
    """Draft tokens are the plain answer, but for those at `wrong` places of each."""

    def propose(lookup: NgramLookup, count: int) -> list[int]:
        said = len(lookup.keys) - lookup.prompt  # type: ignore[attr-defined]
        right = (answer[said:] + [5] * count)[:count]
        return [t if i not in wrong else 6 - (t == 6) for i, t in enumerate(right)]

    real = NgramLookup.__init__

    def begin(lookup: NgramLookup, keys: list[Any]) -> None:
        real(lookup, keys)
        lookup.prompt = len(keys)  # type: ignore[attr-defined]

    monkeypatch.setattr(NgramLookup, "__init__", begin)
    monkeypatch.setattr(NgramLookup, "propose", propose)


def tokens_of(llava: Llava, prompt: str, tokens: int) -> list[int]:
    """Tokens of a plain answer, all but the last; they are what the KV cache holds after the prompt."""
    result = ask(llava, prompt, "off", tokens)
    keys = llava._engine.model.scheduler._language.cached_keys[result.prompt_tokens :]
    return [key for key in keys if isinstance(key, int)]


def prove(llava: Llava) -> None:
    """Take batches for proven."""
    for block in range(2):
        for width in WIDTHS * MIN_EQUAL_ROWS:
            llava._engine.model.scheduler._speculation.bits.record(block * BLOCK, width, True)


@pytest.mark.parametrize(("wrong", "most", "least"), [((), 80, 50), ((0,), 0, 0), ((3,), 60, 30), ((6,), 75, 45)])
def test_any_draft_tokens_give_the_plain_answer(
    wrong: tuple[int, ...], most: int, least: int, unproven: Llava, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Always right, always wrong at once, right for a while."""
    plain = ask(unproven, PROMPT, "off", 80)
    draft_from(monkeypatch, tokens_of(unproven, PROMPT, 80), wrong)
    for _ in range(3):
        speculative = ask(unproven, PROMPT, "ngram", 80)
        assert speculative.text == plain.text
    assert least <= speculative.accepted_tokens <= most


def test_the_kv_cache_holds_what_was_said(unproven: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    said = tokens_of(unproven, PROMPT, 60)
    language = unproven._engine.model.scheduler._language
    plain = list(language.cached_keys)
    draft_from(monkeypatch, said, (2,))
    prove(unproven)
    assert ask(unproven, PROMPT, "ngram", 60).accepted_tokens > 10
    assert language.cached_keys[: len(plain)] == plain
    end = language.library.llama_memory_seq_pos_max(language._memory, 0)
    assert end == len(language.cached_keys) - 1


def test_a_rollback_that_keeps_too_much_would_be_noticed(unproven: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control of the tests above: they see one wrong token that stays in the KV cache."""
    plain = ask(unproven, PROMPT, "off", 80)
    draft_from(monkeypatch, tokens_of(unproven, PROMPT, 80), (2,))
    prove(unproven)
    real = LanguageModel.truncate
    monkeypatch.setattr(LanguageModel, "truncate", lambda self, length: real(self, length + 1))
    assert ask(unproven, PROMPT, "ngram", 80).text != plain.text


def noisy(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    real, rng = LanguageModel.evaluate_all_logits, np.random.default_rng(0)

    def evaluate(self: LanguageModel, tokens: list[int], cancel: threading.Event) -> np.ndarray[Any, Any]:
        rows = real(self, tokens, cancel)
        rows += rng.standard_normal(rows.shape, np.float32) * size
        return rows

    monkeypatch.setattr(LanguageModel, "evaluate_all_logits", evaluate)


def test_batches_that_round_differently_are_not_used(unproven: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ask(unproven, PROMPT, "off", 80)
    draft_from(monkeypatch, tokens_of(unproven, PROMPT, 80))
    noisy(monkeypatch, 1e-6)
    speculative = ask(unproven, PROMPT, "ngram", 80)
    assert (speculative.text, speculative.accepted_tokens, speculative.drafted_tokens) == (plain.text, 0, ONCE)
    assert not any(unproven._engine.model.scheduler._speculation.bits.may_be_equal(0, width) for width in WIDTHS)


def test_equal_logits_of_other_states_are_no_proof(unproven: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding in the last product can hide that other kernels computed a batch."""
    plain = ask(unproven, PROMPT, "off", 80)
    draft_from(monkeypatch, tokens_of(unproven, PROMPT, 80))
    real = LanguageModel.hidden_state

    def hidden_state(self: LanguageModel, row: int = -1) -> np.ndarray[Any, Any]:
        state = real(self, row)
        if row == 0:  # of a batch; single tokens have -1
            state *= np.float32(1 + 1e-6)
        return state

    monkeypatch.setattr(LanguageModel, "hidden_state", hidden_state)
    speculative = ask(unproven, PROMPT, "ngram", 80)
    assert (speculative.text, speculative.accepted_tokens, speculative.drafted_tokens) == (plain.text, 0, ONCE)


def test_without_the_proof_such_batches_change_answers(unproven: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: larger differences of this kind turn near ties, which is why batches have to be proven."""
    plain = ask(unproven, PROMPT, "off", 80)
    draft_from(monkeypatch, tokens_of(unproven, PROMPT, 80))
    noisy(monkeypatch, 0.5)
    assert ask(unproven, PROMPT, "ngram", 80).text == plain.text
    unproven._engine.model.scheduler._speculation.bits = BitChecks()
    prove(unproven)
    assert ask(unproven, PROMPT, "ngram", 80).text != plain.text


def test_speculation_ends_where_it_does_not_pay(unproven: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    draft_from(monkeypatch, tokens_of(unproven, PROMPT, 150), (0,))
    monkeypatch.setattr(Costs, "record", lambda self, what, seconds: None)
    auto, always = ask(unproven, PROMPT, "auto", 150), ask(unproven, PROMPT, "ngram", 150)
    assert auto.text == always.text
    passes = auto.drafted_tokens / (WIDTHS[0] - 1)
    # Each loses one token's time at the assumed cost of 2.
    assert 2 < passes <= speculation.FIXED_LOSS + 150 * speculation.LOSS_PER_TOKEN
    assert always.drafted_tokens > 20 * auto.drafted_tokens


def test_on_a_gpu_speculation_has_to_be_asked_for(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    language = llava._engine.model.scheduler._language
    monkeypatch.setattr(language, "on_gpu", True)
    monkeypatch.setattr(llava._engine.model.scheduler, "_speculation", speculation.Speculation(language))
    drafted = {how: ask(llava, "again again again", how, 24).drafted_tokens for how in ("auto", "ngram")}
    assert drafted["auto"] == 0 < drafted["ngram"]
    assert speculation.Speculation(language, cast(DraftModel, "a draft model")).auto


def test_limits_and_stop_sequences_in_the_middle_of_a_batch(unproven: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ask(unproven, PROMPT, "off", 40)
    draft_from(monkeypatch, tokens_of(unproven, PROMPT, 40))
    prove(unproven)
    for limit in range(1, 20):
        short = ask(unproven, PROMPT, "ngram", limit)
        assert (short.completion_tokens, short.finish_reason) == (limit, "length")
        assert short.accepted_tokens < limit  # the first one is not drafted
        assert plain.text.startswith(short.text.rstrip("\ufffd"))
    stop = plain.text[len(plain.text) // 2 :][:2]
    cut = ask(unproven, PROMPT, "ngram", 40, stop=(stop,))
    assert (cut.text, cut.finish_reason) == (plain.text[: plain.text.find(stop)], "stop")


def test_what_a_grammar_cannot_go_on_with_is_no_error_behind_the_end_of_an_answer(unproven: Llava) -> None:
    """Neither within a batch. Where it is one, what was said before is read first."""
    prove(unproven)
    said = "ab, " * 8
    grammar = f'root ::= "{said}" "\\x00"'  # which is no token's beginning

    def read(speculate: Speculate, limit: int, stop: str) -> str:
        options, text = Options(max_tokens=limit, speculate=speculate, grammar=grammar, stop=(stop,)), ""
        try:
            for chunk in unproven.stream("?", (), options):
                text += chunk.text
        except UsageError:
            text += "no token"
        return text

    for limit in range(len(said) - 8, len(said) + 1):
        assert read("ngram", limit, "none") == said[:limit]
    assert read("ngram", 99, said[2:]) == "ab"
    assert read("ngram", 99, "none") == said + "no token"


def test_nothing_is_chosen_after_the_end(unproven: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is drafted there: the grammar could not follow it."""
    language = unproven._engine.model.scheduler._language
    prove(unproven)
    for grammar in ("%llguidance {}\nstart: /a{9}/", "root ::= [a]{9}"):
        plain = ask(unproven, PROMPT, "off", 40, grammar=grammar)
        said: Any = language.cached_keys[plain.prompt_tokens :]
        ends = [token for token in range(language.vocabulary.size) if language.vocabulary.is_end_token(token)]
        draft_from(monkeypatch, [*said, *[max(ends, key=language.logits().__getitem__)] * 9])
        found = ask(unproven, PROMPT, "ngram", 40, grammar=grammar)
        assert (found.text, found.finish_reason) == (plain.text, "stop")
        assert found.accepted_tokens > 3
        assert language.cached_keys[plain.prompt_tokens :] == said


def test_the_end_of_the_context(micro_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Llava.load(micro_bundle, EngineOptions(device="cpu", threads=1, context=64)) as small:
        plain = ask(small, "hello", "off", 500)
        draft_from(monkeypatch, tokens_of(small, "hello", 500))
        speculative = ask(small, "hello", "ngram", 500)
    assert speculative.text == plain.text
    assert speculative.prompt_tokens + speculative.completion_tokens == 64


def test_random_answers_are_not_speculated(llava: Llava) -> None:
    on, off = (ask(llava, PROMPT, speculate, temperature=1.0, seed=3) for speculate in ("ngram", "off"))
    assert on.text == off.text
    assert on.drafted_tokens == 0


def test_numbers_that_are_not_finite_are_refused_in_a_batch(language: LanguageModel) -> None:
    language.keep_common_prefix([0])
    rows = language.evaluate_all_logits([5, 6, 7], NEVER)
    language.truncate(0)
    for token, row in zip([5, 6, 7], rows, strict=True):
        language.evaluate_tokens([token], NEVER)
        assert np.allclose(language.logits(), row, atol=1e-3)
    values = language.library.llama_get_logits_ith(language.context, -1)
    values[3] = float("nan")
    with pytest.raises(BundleError, match="not finite"):
        language.greedy_token()


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 9))
@example([0, 1, 2, 0, 0, 1, 2], 3)  # the very first ones
def test_what_followed_last_time_is_proposed(keys: list[int], count: int) -> None:
    n = speculation.NGRAM
    lookup = NgramLookup(list(keys))
    ends = [at for at in range(n, len(keys)) if keys[at - n : at] == keys[-n:]]
    wanted = list(keys)
    if ends:
        for i in range(count):
            wanted.append(wanted[ends[-1] + i])
    assert lookup.propose(count) == wanted[len(keys) :]


def test_images_are_not_proposed() -> None:
    image: list[Any] = [("image", row) for row in range(6)]
    assert NgramLookup([1, 2, 3, 4, *image, 1, 2, 3, 4]).propose(3) == []
    assert NgramLookup([1, 2, 3, 4, *image, 1, 2, 3]).propose(3) == []
    assert NgramLookup([*image, 1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4]).propose(3) == [5, 6, 7]


def test_one_verdict_for_each_width_and_block() -> None:
    bits = BitChecks()
    for _ in range(MIN_EQUAL_ROWS - 1):
        bits.record(10, 8, True)
    assert bits.may_be_equal(10, 8)
    assert not bits.proven(10, 8)
    bits.record(20, 8, True)
    assert bits.proven(BLOCK - 8, 8)
    assert bits.may_be_equal(BLOCK - 8, 8)
    assert not bits.proven(BLOCK, 8)
    assert not bits.proven(20, 4)
    assert not bits.may_be_equal(BLOCK - 7, 8)  # it would reach into the next block
    assert bits.may_be_equal(BLOCK - 7, 4)
    bits.record(30, 8, False)
    bits.record(30, 8, True)
    assert not bits.may_be_equal(10, 8)
    assert bits.may_be_equal(10, 4)
    known = BitChecks(known=True)
    assert known.may_be_equal(BLOCK - 7, 8)
    assert known.proven(BLOCK - 7, 8)


@pytest.mark.parametrize(("four", "eight", "wanted"), [(2.0, 3.9, 4), (1.3, 1.8, 8), (1.3, 3.0, 4), (2.0, 2.2, 8)])
def test_the_width_that_promises_most(
    four: float, eight: float, wanted: int, unproven: Llava, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = unproven._engine.model.scheduler._speculation
    shared.costs.record(4, 1.0)  # before any single token: unknown
    assert shared.costs.batch(4) == 2.0
    for _ in range(5):
        shared.costs.record(1, 0.01)
    for width, cost in ((4, four), (8, eight)):
        shared.costs.record(width, 9.0)  # others used the processor
        for _ in range(4):
            shared.costs.record(width, cost / 100)
    assert shared.best_width(0, 99) == wanted
    assert shared.best_width(0, min(four, eight) - 0.1) == 0  # more than it may cost
    shared.bits.record(0, wanted, False)
    assert shared.best_width(0, 99) == 12 - wanted
    shared.bits = BitChecks(known=True)
    assert [shared.best_width(shared.language.context_size - room, 99) for room in (3, 4)] == [0, 4]


def test_a_disturbance_does_not_stop_speculation_for_good(unproven: Llava) -> None:
    shared = unproven._engine.model.scheduler._speculation
    costs = shared.costs
    costs.record(1, 0.01)
    for seconds in (0.017, 0.09, 0.08, 0.07):  # others used the processor
        costs.record(4, seconds)
    assert costs.batch(4) > 7
    speculation.SpeculativeDecoder(shared, lambda _: (0, False), always=False)  # the next answer
    assert costs.batch(4) == pytest.approx(1.7)
    for seconds in (0.08, 0.08):  # they still do
        costs.record(4, seconds)
    assert costs.batch(4) > 7


def test_what_was_not_measured_costs_as_much_for_each_token() -> None:
    costs = Costs()
    costs.record(1, 1.0)
    costs.record(4, 1.6)
    assert costs.batch(8) == pytest.approx(2.4)
    assert costs.draft == 0
    costs.record("draft", 0.5)
    assert costs.draft == 0.5
