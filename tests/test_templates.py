"""Every published layout, byte for byte, and its token ids as LLaVA's own tokenizer gives them.

The oracle is transformers' LlamaTokenizer, called as llava/mm_utils.py does; what is tested is llama.cpp with the
exported vocabulary, as the runtime uses it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_vocabulary
import pytest
from hugging_face import V5
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import LlamaTokenizer, PreTrainedTokenizer

from llava_edge import prompt
from llava_edge.bundle import Bundle
from llava_edge.export import parity
from llava_edge.export.exporter import ExportOptions, export
from llava_edge.options import EngineOptions, Options, result_of
from llava_edge.prompt import AfterControl, EncodeText, Message, Piece
from llava_edge.runtimes import tokenization
from llava_edge.runtimes.language import LanguageModel
from llava_edge.runtimes.pipeline import Engine
from llava_edge.templates import TEMPLATES

ABOUT = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
WAIV = (
    "You are LLaVA, a large language and vision assistant trained by UW Madison WAIV Lab."
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "Follow the instructions carefully and explain your answers in detail."
)
LLAMA_2 = (
    "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to understand the visual content "
    "that the user provides, and assist the user with a variety of tasks using natural language.\n<</SYS>>\n\n"
)
MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
ENERGY = TEMPLATES["v0"].example or ("", "")

Q1 = Message("user", "What is this?", 1)
A1 = Message("assistant", "A cat.")
Q2 = Message("user", "Sure?")

# template -> (prompt of one turn without BOS, what the first answer and the second question add to it)
STRINGS = {
    "vicuna_v1": (
        f"{ABOUT.replace('human', 'user')} USER: <image>\nWhat is this? ASSISTANT:",
        " A cat.</s>USER: Sure? ASSISTANT:",
    ),
    "llava_v1": (f"{ABOUT} USER: <image>\nWhat is this? ASSISTANT:", " A cat.</s>USER: Sure? ASSISTANT:"),
    "llava_v1_1": (f"{WAIV} USER: <image>\nWhat is this? ASSISTANT:", " A cat.</s>USER: Sure? ASSISTANT:"),
    "llava_v0": (f"{ABOUT}###Human: <image>\nWhat is this?###Assistant:", " A cat.###Human: Sure?###Assistant:"),
    "v0": (
        f"{ABOUT}###Human: {ENERGY[0]}###Assistant: {ENERGY[1]}###Human: <image>\nWhat is this?###Assistant:",
        " A cat.###Human: Sure?###Assistant:",
    ),
    "multimodal": (
        f"{WAIV}###Human: Hi!###Assistant: Hi there!  How can I help you today?\n"
        "###Human: What is this?\n<image>###Assistant:",
        " A cat.###Human: Sure?###Assistant:",
    ),
    "llava_llama_2": (f"{LLAMA_2}<image>\nWhat is this? [/INST]", " A cat. </s><s>[INST] Sure? [/INST]"),
    "mistral_instruct": ("[INST] <image>\nWhat is this? [/INST]", " A cat. </s>[INST] Sure? [/INST]"),
    "mpt": (
        f"<|im_start|>system\n{MPT}<|im_end|><|im_start|>user\n<image>\nWhat is this?<|im_end|><|im_start|>assistant\n",
        "A cat.<|im_end|><|im_start|>user\nSure?<|im_end|><|im_start|>assistant\n",
    ),
    "chatml_direct": (
        "<|im_start|>system\nAnswer the questions.<|im_end|>"
        "<|im_start|>user\n<image>\nWhat is this?<|im_end|><|im_start|>assistant\n",
        "A cat.<|im_end|><|im_start|>user\nSure?<|im_end|><|im_start|>assistant\n",
    ),
    "chatml": (
        "<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n<|im_start|>assistant\n",
        "A cat.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n",
    ),
}
STAGE_ONE = {"plain", "plain_chatml"}  # no questions, so no turns; their texts are in test_prompt.py


def as_text(pieces: Sequence[Piece]) -> str:
    """The prompt as one string as LLaVA builds it: `<image>` for a picture, no BOS."""
    shown = {"bos": "", "image": "<image>"}
    return "".join(shown.get(piece.kind, piece.text) for piece in pieces)


def test_every_template_is_written_out_here() -> None:
    assert STRINGS.keys() | STAGE_ONE == TEMPLATES.keys()


@pytest.mark.parametrize("name", STRINGS)
def test_prompt_strings(name: str) -> None:
    one, more = STRINGS[name]
    assert as_text(prompt.render(name, [Q1])) == one
    assert as_text(prompt.render(name, [Q1, A1, Q2])) == one + more
    closed = as_text(prompt.render(name, [Q1, A1]))
    assert closed.startswith(one)
    assert (one + more).startswith(closed)


@pytest.mark.parametrize("name", STRINGS)
def test_a_template_names_its_control_tokens_and_what_ends_an_answer(name: str) -> None:
    template, pieces = TEMPLATES[name], prompt.render(name, [Q1, A1, Q2, A1])
    assert set(template.controls) == {piece.text for piece in pieces if piece.kind in ("bos", "control")}
    end = [piece for piece in pieces if piece.trained][-1]
    ends = (template.stop_tokens, template.stop_sequences)
    assert ends == (((end.text,), ()) if end.kind == "control" else ((), (end.text.removeprefix(" A cat."),)))


def test_the_example_of_v0() -> None:
    """The hash is that of the text in llava/conversation.py."""
    assert hashlib.sha256(ENERGY[1].encode()).hexdigest().startswith("29c0f588aa19dd65")


@pytest.mark.parametrize("name", ["llava_v0", "multimodal", "llava_llama_2", "mpt"])
def test_markers_stand_around_every_picture(name: str) -> None:
    plain = as_text(prompt.render(name, [Message("user", "Compare.", 2)]))
    marked = as_text(prompt.render(name, [Message("user", "Compare.", 2)], ("<im_start>", "<im_end>")))
    assert plain.count("<image>") == 2
    assert marked == plain.replace("<image>", "<im_start><image><im_end>")


# Token ids ---------------------------------------------------------------------------------------------------------


class Transformers431(LlamaTokenizer):
    """LlamaTokenizer with legacy = false as transformers 4.31 to 4.33 had it, with which LLaVA-1.5 was trained."""

    def tokenize(self, text: str, *_: Any, **kwargs: Any) -> list[str]:
        return PreTrainedTokenizer.tokenize(self, "▁" + text.replace("▁", " "), **kwargs)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        first = text.startswith("▁")
        text = text.removeprefix("▁")
        tokens: list[str] = self.sp_model.encode(text, out_type=str)
        if first or text.startswith(" ") or not tokens or not tokens[0].startswith("▁"):
            return tokens
        return [token for token in (tokens[0][1:], *tokens[1:]) if token]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_vocabulary.write_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def language(folder: Path) -> Iterator[LanguageModel]:
    model = llama_vocabulary.engine(folder)
    yield model
    model.close()


@pytest.fixture(scope="module")
def oracles(folder: Path) -> dict[AfterControl, LlamaTokenizer]:
    """By their way; transformers 5 has one way only."""
    path = str(folder / "tokenizer.model")
    if V5:
        names: Any = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        tokenizer: LlamaTokenizer = LlamaTokenizer.from_pretrained(folder, **names)
        tokenizer.add_special_tokens({"additional_special_tokens": llama_vocabulary.ADDED})
        return {"bare": tokenizer}
    found: dict[AfterControl, LlamaTokenizer] = {
        "prefix": LlamaTokenizer(path, legacy=True),
        "bare": LlamaTokenizer(path, legacy=False),
        "cut": Transformers431(path, legacy=True),
    }
    for tokenizer in found.values():
        tokenizer.add_special_tokens({"additional_special_tokens": llama_vocabulary.ADDED})
    return found


def tokenizer_image_token(tokenizer: LlamaTokenizer, text: str, bos: bool) -> list[int]:
    """Chunks between pictures, each tokenized with its own BOS, of which the first one's stays."""
    tokenizer.add_bos_token = bos
    chunks = [tokenizer(chunk).input_ids for chunk in text.split("<image>")]
    ids: list[int] = chunks[0]
    for chunk in chunks[1:]:
        ids += [prompt.IMAGE_TOKEN_INDEX, *chunk[int(bos) :]]
    return ids


@pytest.fixture(scope="module")
def encoders(language: LanguageModel) -> dict[AfterControl, EncodeText]:
    ways: tuple[AfterControl, ...] = ("prefix", "bare", "cut")
    return {way: tokenization.after_control_encoder(language.vocabulary, way) for way in ways}


def oracle(oracles: dict[AfterControl, LlamaTokenizer], way: AfterControl) -> LlamaTokenizer:
    if way not in oracles:
        pytest.skip(f"this transformers has no tokenizer with {way!r} behind control tokens; version 4 has")
    return oracles[way]


@pytest.mark.parametrize("way", ["prefix", "bare", "cut"])
@pytest.mark.parametrize("name", STRINGS)
def test_ids_equal_transformers(
    name: str,
    way: AfterControl,
    language: LanguageModel,
    encoders: dict[AfterControl, EncodeText],
    oracles: dict[AfterControl, LlamaTokenizer],
) -> None:
    if V5 and name == "multimodal":
        pytest.skip("transformers 5 sorts merges by id, so it joins two spaces first; SentencePiece joins them last")
    pieces = prompt.render(name, [Q1, A1, Q2])
    wanted = tokenizer_image_token(oracle(oracles, way), "".join(STRINGS[name]), TEMPLATES[name].bos is not None)
    assert prompt.encode(pieces, language.vocabulary.tokenize, language.vocabulary.control_id, encoders[way]) == wanted


@pytest.mark.parametrize("name", ["llava_v0", "multimodal", "llava_v1_1"])
def test_ids_with_markers_equal_transformers(
    name: str, language: LanguageModel, oracles: dict[AfterControl, LlamaTokenizer]
) -> None:
    """The models that have markers come with tokenizers without a legacy flag."""
    text = "".join(STRINGS[name]).replace("<image>", "<im_start><image><im_end>")
    pieces = prompt.render(name, [Q1, A1, Q2], ("<im_start>", "<im_end>"))
    wanted = tokenizer_image_token(oracle(oracles, "prefix"), text, True)
    assert prompt.encode(pieces, language.vocabulary.tokenize, language.vocabulary.control_id) == wanted


@pytest.mark.parametrize(("way", "user"), [("prefix", [3148, 1001]), ("bare", [11889]), ("cut", [3308, 1001])])
def test_golden_ids_of_the_second_turn(
    way: AfterControl, user: list[int], language: LanguageModel, encoders: dict[AfterControl, EncodeText]
) -> None:
    turns = [Q1, A1, Q2, Message("assistant", "Yes.")]
    pieces = prompt.render("vicuna_v1", turns)
    ids, labels = prompt.encode_with_labels(
        pieces, language.vocabulary.tokenize, language.vocabulary.control_id, encoders[way]
    )
    assert ids[33:] == [
        *(29901, 29871, -200, 29871, 13, 5618, 338, 445, 29973, 319, 1799, 9047, 13566, 29901, 319, 6635, 29889, 2),
        *(*user, 29901, 18585, 29973, 319, 1799, 9047, 13566, 29901, 3869, 29889, 2),
    ]
    assert len(ids) == len(labels) == 62 + len(user)
    assert [label for label in labels if label >= 0] == [319, 6635, 29889, 2, 3869, 29889, 2]


LINES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from([" two  spaces ", "▁x", "é\n"])


@pytest.mark.skipif(V5, reason="transformers 5 has no tokenizer in Python whose parts could be called")
@given(text=LINES)
def test_text_behind_a_control_token_equals_transformers(
    text: str, encoders: dict[AfterControl, EncodeText], oracles: dict[AfterControl, LlamaTokenizer]
) -> None:
    for way, tokenizer in oracles.items():
        written = text.replace("▁", " ") if way != "prefix" else text  # LlamaTokenizer.tokenize does that to a prompt
        tokens = tokenizer._tokenize(written)
        wanted = [tokenizer._convert_token_to_id(token) for token in tokens]
        assert encoders[way](text) == wanted, way


@pytest.mark.parametrize("name", STRINGS)
def test_only_answers_and_their_end_are_trained(name: str, language: LanguageModel) -> None:
    turns = [Q1, A1, Q2, Message("assistant", "Yes.")]
    pieces = prompt.render(name, turns)
    ids, labels = prompt.encode_with_labels(pieces, language.vocabulary.tokenize, language.vocabulary.control_id)
    texts = language.vocabulary.token_texts()
    trained = "".join(texts[label] for label in labels if label >= 0)
    end = TEMPLATES[name].end
    assert trained.replace("▁", "") == f"Acat.{end}Yes.{end}"
    assert all(label in (prompt.IGNORE_INDEX, n) for n, label in zip(ids, labels, strict=True))


def test_an_exported_chat_is_as_long_as_transformers_says(
    folder: Path, oracles: dict[AfterControl, LlamaTokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From config.json and tokenizer_config.json through the manifest to the runtime: markers and `legacy`."""
    monkeypatch.setattr(parity, "unavailable_reason", lambda: "of no interest here")
    (folder / "tokenizer_config.json").write_text('{"legacy": false}', "utf-8")
    manifest = export(ExportOptions(folder, tmp_path / "bundle", quant="f16", vision="fp32"))
    assert (manifest.after_control, manifest.image_markers) == ("bare", ["<im_start>", "<im_end>"])
    with Engine.open(Bundle.open(tmp_path / "bundle"), EngineOptions(device="cpu", threads=1)) as engine:
        found = result_of(engine.generate([Q1, A1, Q2], [Image.new("RGB", (32, 32))], Options(max_tokens=1)))
    text = "".join(STRINGS["vicuna_v1"]).replace("<image>", "<im_start><image><im_end>")
    wanted = len(tokenizer_image_token(oracles["bare"], text, True)) - 1 + manifest.vision.image_tokens
    assert found.prompt_tokens == wanted


# What a user may type ----------------------------------------------------------------------------------------------

HOSTILE = ["<s>", "</s>", "<unk>", "<image>", "<im_start>", "<im_end>", "<im_patch>", "[INST]", "[/INST]", "<<SYS>>"]
HOSTILE += ["###", "###Assistant:", "<|im_start|>system\n", "<|im_end|>", "<0x0A>", "\0", "USER:", " ", "\n", "hello"]


@given(
    name=st.sampled_from(sorted(STRINGS)),
    words=st.lists(st.sampled_from(HOSTILE), max_size=6).map("".join),
    answer=st.lists(st.sampled_from(HOSTILE), max_size=3).map("".join),
    way=st.sampled_from(["prefix", "bare", "cut"]),
    marked=st.booleans(),
)
def test_typed_text_never_becomes_control(
    name: str,
    words: str,
    answer: str,
    way: AfterControl,
    marked: bool,
    language: LanguageModel,
    encoders: dict[AfterControl, EncodeText],
) -> None:
    """Whatever is said, control tokens and pictures are those of the same conversation about nothing.

    `###` and `[INST]` are text in the layouts that use them: there they can be typed, as in the original.
    """
    markers = ("<im_start>", "<im_end>") if marked else ()
    control = {language.vocabulary.control_id(n) for n in ("<s>", "</s>", *llama_vocabulary.ADDED)} | {
        prompt.IMAGE_TOKEN_INDEX,
        0,
    }

    def controls(question: str, reply: str) -> list[int]:
        turns = [Message("user", question, 1), Message("assistant", reply), Message("user", question)]
        pieces = prompt.render(name, turns, markers)
        ids = prompt.encode(pieces, language.vocabulary.tokenize, language.vocabulary.control_id, encoders[way])
        return [n for n in ids if n in control]

    found = controls(words, answer)
    assert found == controls("x", "y")
    assert found.count(prompt.IMAGE_TOKEN_INDEX) == 1
