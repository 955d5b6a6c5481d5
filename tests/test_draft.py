"""A draft model: it may propose what it likes, answers are those of plain decoding."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from llava_edge import Llava
from llava_edge.bundle import LANGUAGE, Bundle
from llava_edge.cli import cli
from llava_edge.errors import BundleError, MissingError, UsageError
from llava_edge.export.checkpoint import open_checkpoint
from llava_edge.export.llm_gguf import write_language
from llava_edge.export.tokenizer import read_tokenizer
from llava_edge.export.vocabulary import Vocabulary
from llava_edge.models import micro
from llava_edge.options import EngineOptions, Options
from llava_edge.runtimes import speculation
from llava_edge.runtimes.draft import DraftModel
from llava_edge.runtimes.embedder import Embedder
from llava_edge.runtimes.language import LanguageModel
from llava_edge.runtimes.speculation import MIN_EQUAL_ROWS, WIDTHS, Costs, Speculation

NEVER = threading.Event()
COUNT = WIDTHS[0] - 1
RED = Image.new("RGB", (48, 32), "red")
QUESTIONS = ["a list:", "the red", "one, two,", "é€😀"]
PLAIN, SPECULATIVE = Options(max_tokens=40, speculate="off"), Options(max_tokens=40, speculate="ngram")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of other weights and the same vocabulary."""
    folder = tmp_path_factory.mktemp("other")
    checkpoint = open_checkpoint(micro.write_checkpoint(folder / "checkpoint", tensors=micro.random_tensors(seed=9)))
    write_language(checkpoint, read_tokenizer(checkpoint.tokenizer, checkpoint.config), folder / "other.gguf", "other")
    return folder / "other.gguf"


def load(bundle: Path, draft: Path) -> Llava:
    return Llava.load(bundle, EngineOptions(device="cpu", threads=1, cache=False, draft=draft))


def prove(llava: Llava) -> Speculation:
    """Take batches for proven."""
    for block in range(2):
        for width in WIDTHS * MIN_EQUAL_ROWS:
            llava._engine.model.scheduler._speculation.bits.record(block * speculation.BLOCK, width, True)
    return llava._engine.model.scheduler._speculation


def fix_costs(shared: Speculation, draft: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass of four costs two single tokens, and a proposal `draft` of them."""
    shared.costs = Costs()
    for what, cost in ((1, 1.0), (WIDTHS[0], 2.0), ("draft", draft)):
        Costs.record(shared.costs, what, cost)
    monkeypatch.setattr(shared.costs, "record", lambda what, seconds: None)


def test_it_proposes_what_it_would_say_itself(micro_bundle: Path, language: LanguageModel) -> None:
    """Pictures left out, and again after other words."""
    draft = DraftModel(micro_bundle / LANGUAGE, language, threads=1)
    for text in ([5, 6, 7, 8], [5, 6, 9], [5, 6, 9, 10, 11]):
        language.truncate(0)
        language.evaluate_tokens(text, NEVER)
        wanted = []
        for _ in range(COUNT):
            wanted.append(language.greedy_token())
            language.evaluate_tokens(wanted[-1:], NEVER)
        assert draft.propose([*text[:2], ("picture", 0), ("picture", 1), *text[2:]], COUNT, NEVER) == wanted
    assert draft.propose([5] * 510, COUNT, NEVER) == []  # no room
    assert draft.propose([language.vocabulary.size], COUNT, NEVER) == []  # unknown to it
    draft.close()


def test_tokens_that_only_the_draft_has_are_not_proposed(tmp_path: Path, language: LanguageModel) -> None:
    """Its table of embeddings may be longer. Here one of the two rows behind the others' is always the likeliest."""
    config = replace(micro.CONFIG, text=replace(micro.CONFIG.text, vocab_size=micro.VOCABULARY + 2))
    tensors = micro.random_tensors(config)
    head = tensors["language_model.lm_head.weight"]
    head[:-2] = 0
    head[-1] = -head[-2]
    checkpoint = open_checkpoint(micro.write_checkpoint(tmp_path, config=config, tensors=tensors))
    write_language(checkpoint, read_tokenizer(checkpoint.tokenizer, checkpoint.config), tmp_path / "longer.gguf", "x")
    draft = DraftModel(tmp_path / "longer.gguf", language, threads=1)
    assert draft.propose([5, 6, 7], COUNT, NEVER) == []
    draft.close()


def test_answers_are_those_of_plain_decoding(micro_bundle: Path, other: Path) -> None:
    """With a draft that is mostly wrong, and with one that is right, but for what only the picture tells."""
    accepted = {False: 0, True: 0}
    for path, right in ((other, False), (micro_bundle / LANGUAGE, True)):
        with load(micro_bundle, path) as llava:
            prove(llava)
            for question in QUESTIONS:
                for images in ((), RED):
                    plain, speculative = llava.ask(question, images, PLAIN), llava.ask(question, images, SPECULATIVE)
                    assert (speculative.text, speculative.completion_tokens) == (plain.text, plain.completion_tokens)
                    assert speculative.drafted_tokens > 20
                    accepted[right] += 0 if images else speculative.accepted_tokens
    assert accepted[True] > 1.4 * accepted[False]


def test_a_bad_one_is_soon_left_alone(micro_bundle: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One try in an answer, and one more for each 50 tokens a single token's time allows."""
    with load(micro_bundle, other) as llava:
        shared = prove(llava)
        fix_costs(shared, 0.5, monkeypatch)
        monkeypatch.setattr(speculation.NgramLookup, "propose", lambda lookup, count: [])
        result = llava.ask("a list:", (), Options(max_tokens=100, speculate="auto"))
        assert result.completion_tokens == 100
        assert COUNT <= result.drafted_tokens <= 4 * COUNT


def test_a_draft_that_costs_more_than_it_wins_is_left_alone(
    micro_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is always right, but as slow as the model itself."""
    with load(micro_bundle, micro_bundle / LANGUAGE) as llava:
        shared = prove(llava)
        monkeypatch.setattr(speculation.NgramLookup, "propose", lambda lookup, count: [])
        for cost, least, most in ((0.5, 60, 100), (9.0, COUNT, COUNT)):
            fix_costs(shared, cost, monkeypatch)
            result = llava.ask("a list:", (), Options(max_tokens=100, speculate="auto"))
            assert least <= result.drafted_tokens <= most
        monkeypatch.setattr(DraftModel, "propose", lambda *_: [5] * (COUNT - 1))  # less than a batch holds
        assert llava.ask("a list:", (), SPECULATIVE).drafted_tokens == 0


def test_what_cannot_be_a_draft_is_refused(
    micro_bundle: Path, micro_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is loaded."""
    for part in (Embedder, LanguageModel):
        monkeypatch.setattr(part, "__init__", lambda *_, **__: pytest.fail("it would be loaded"))
    with pytest.raises(MissingError, match="no draft model"):
        load(micro_bundle, tmp_path / "missing.gguf")
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(BundleError):
        load(micro_bundle, tmp_path / "text.gguf")
    with pytest.raises(BundleError, match=r"projector\.gguf"):
        load(micro_bundle, micro_bundle / "projector.gguf")
    checkpoint = open_checkpoint(micro_checkpoint)
    right = read_tokenizer(checkpoint.tokenizer, checkpoint.config)
    swapped = [*right.tokens[:20], right.tokens[21], right.tokens[20], *right.tokens[22:]]
    wrong = Vocabulary(**{**right.__dict__, "tokens": swapped})
    write_language(checkpoint, wrong, tmp_path / "swapped.gguf", "swapped")
    with pytest.raises(UsageError, match=r"vocabulary of .* differs .*token 20 on"):
        load(micro_bundle, tmp_path / "swapped.gguf")


def test_its_log_is_shown_where_the_engines_are(
    micro_bundle: Path, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for verbose in (True, False):
        options = EngineOptions(device="cpu", threads=1, cache=False, draft=other, verbose=verbose)
        with Llava.load(micro_bundle, options):
            assert (other.name in capsys.readouterr().err) == verbose


def test_the_command_takes_one(micro_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RED.save(tmp_path / "red.png")
    run = ["run", "--model", str(micro_bundle), "--image", str(tmp_path / "red.png"), "--prompt", "a list:", "--json"]
    plain = json.loads(CliRunner().invoke(cli, [*run, "--speculate", "off"]).stdout)
    draft = ["--draft", str(Bundle.open(micro_bundle).part(LANGUAGE)), "--speculate", "ngram"]
    speculative = json.loads(CliRunner().invoke(cli, [*run, *draft]).stdout)
    assert speculative["text"] == plain["text"]
    assert speculative["drafted_tokens"] > 0 == plain["drafted_tokens"]
    monkeypatch.setenv("HOME", str(Bundle.open(micro_bundle).folder))
    at_home = CliRunner().invoke(
        cli, [*run, f"--draft=~/{LANGUAGE}", "--speculate", "ngram"]
    )  # no shell replaces this ~
    assert json.loads(at_home.stdout)["text"] == plain["text"]
    missing = CliRunner().invoke(cli, [*run, "--draft", "missing.gguf"])
    assert isinstance(missing.exception, MissingError)
