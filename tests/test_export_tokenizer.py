"""Exported vocabularies tokenize like the original tokenizers, or the export refuses them."""

from __future__ import annotations

import io
import json
from contextlib import closing
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import hugging_face
import numpy as np
import pytest
import sentencepiece
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from llava_edge.errors import CheckpointError, MissingError
from llava_edge.export.byte_level_json import LLAMA3_SPLIT
from llava_edge.export.checkpoint import open_checkpoint
from llava_edge.export.llm_gguf import write_language
from llava_edge.export.tokenizer import read_after_control, read_tokenizer
from llava_edge.export.vocabulary import Vocabulary
from llava_edge.models import micro
from llava_edge.models.config import LlavaConfig, from_hf, to_hf
from llava_edge.prompt import Message, encode, render
from llava_edge.runtimes.language import LanguageModel

TEXTS = (
    "Hello world",
    " leading and trailing ",
    "two  spaces   three    four\tand\ttabs",
    "lines\n\nand\r\nreturns\n",
    "\n",
    " ",
    "    ",
    "1234567890 3.14 2nd 10%",
    "it's don't we'll I'VE you'd THEY'RE",
    "don`t “quote” \u2018it\u2019 — dash… •",
    "naïve café Ångström e\u0301 ﬁ ½ ² Ⅷ",
    "中文字符 日本語のテキスト 한국어 ไทย हिन्दी עברית العربية",
    "emoji 🙂👩‍👩‍👧‍👦🇩🇪👍🏽",
    "mixed中英文123abc",
    "\u00a0no-break\u2003em\u200bzero\ufeff",
    "a\x00b\x07c\x7f",
    "<s> </s> <unk> <0x41> [PAD300] <|im_start|>user<|im_end|>",
    "▁ ▁▁ underscore_and-hyphen",
    "snake_case CamelCase http://example.org/?q=1&r=[2]",
    "!!! ??? ... ,;: (){}[] ~`@#$^&*+=|\\/<>",
    "USER: <image>\nWhat is it? ASSISTANT:",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "The quick brown fox jumps over the lazy dog." * 4,
)

METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}
PREPEND = {"type": "Prepend", "prepend": "▁"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
DOUBLE = {"type": "Replace", "pattern": {"Regex": "\\A▁"}, "content": "▁▁"}

CORPUS = [
    "The quick brown fox jumps over the lazy dog and it's not what they'd expected, 1234 times in 2024.",
    "A chat between a curious user and an artificial intelligence assistant. USER: what is it? ASSISTANT:",
    "Der schnelle braune Fuchs springt über den faulen Hund. Grüße aus Köln!",
    "Le renard brun rapide saute par-dessus le chien paresseux; c'était naïf.",
    "中文 日本語 한국어 emoji 🙂 and some\ttabs\nand newlines   with   spaces",
] * 20


def write_folder(folder: Path, rows: int, template: str = "chatml", **text: Any) -> LlavaConfig:
    """A checkpoint whose vocabulary has `rows` embeddings; the tokenizer's own file is the test's to write."""
    folder.mkdir(exist_ok=True, parents=True)
    shrunk = replace(micro.CONFIG.text, vocab_size=rows, hidden_size=64, intermediate_size=64, **text)
    config = replace(micro.CONFIG, text=shrunk, template=template)
    (folder / "config.json").write_text(json.dumps(to_hf(config)), "utf-8")
    return config


def engine(folder: Path, vocabulary: Vocabulary) -> LanguageModel:
    """llama.cpp with the exported vocabulary and random weights."""
    save_file(micro.random_tensors(open_config(folder)), folder / "model.safetensors")
    write_language(open_checkpoint(folder), vocabulary, folder / "language.gguf", "test")
    return LanguageModel(folder / "language.gguf", context=32, threads=1)


def open_config(folder: Path) -> LlavaConfig:
    return from_hf(json.loads((folder / "config.json").read_text("utf-8")))


# --- SentencePiece ---------------------------------------------------------------------------------------------


@cache
def sentencepiece_model(**settings: Any) -> bytes:
    """LLaMA's settings on a small corpus."""
    options: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 480,
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 0.995,
        "minloglevel": 2,
    }
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=stream, num_threads=1, **{**options, **settings}
    )
    return stream.getvalue()


def spm_folder(folder: Path, rows: int = 512, **settings: Any) -> LlavaConfig:
    config = write_folder(folder, rows, "vicuna_v1")
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(**settings))
    return config


def test_sentencepiece_comes_out_token_by_token(tmp_path: Path) -> None:
    config = spm_folder(tmp_path)
    vocabulary = read_tokenizer(tmp_path, config)
    original = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    with closing(engine(tmp_path, vocabulary)) as language:
        wrong = [text for text in TEXTS if language.vocabulary.tokenize(text) != original.encode(text)]
        pieces = [language.vocabulary.piece(i) for i in original.encode("Der Fuchs🙂")]
    assert wrong == []
    assert b"".join(pieces).decode() == " Der Fuchs🙂"  # the dummy prefix is part of the first piece


def test_sentencepiece_fields(tmp_path: Path) -> None:
    vocabulary = read_tokenizer(tmp_path, spm_folder(tmp_path))
    original = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    size = original.get_piece_size()
    assert (vocabulary.model, vocabulary.pre) == ("llama", "default")
    assert list(vocabulary.tokens[:size]) == [original.id_to_piece(i) for i in range(size)]
    assert np.allclose(vocabulary.scores[:size], [original.get_score(i) for i in range(size)])
    assert vocabulary.types[:3] == (2, 3, 3)
    assert set(vocabulary.types[3:259]) == {6}
    assert (vocabulary.bos, vocabulary.eos, vocabulary.unknown) == (1, 2, 0)
    assert vocabulary.add_bos
    assert vocabulary.add_space_prefix


def test_added_tokens_and_padding_rows(tmp_path: Path) -> None:
    config = spm_folder(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<image>": 480, "<pad>": 481}', "utf-8")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"add_bos_token": False, "added_tokens_decoder": {"481": {"content": "<pad>", "special": False}}}),
        "utf-8",
    )
    vocabulary = read_tokenizer(tmp_path, config)
    assert vocabulary.tokens[480:483] == ("<image>", "<pad>", "[PAD482]")
    assert vocabulary.types[480:483] == (3, 4, 5)
    assert vocabulary.scores[480:483] == (-1000.0, -1000.0, -10000.0)
    assert vocabulary.tokens[-1] == "[PAD511]"
    assert len(vocabulary.tokens) == len(vocabulary.types) == len(vocabulary.scores) == 512
    assert not vocabulary.add_bos
    with closing(engine(tmp_path, vocabulary)) as language:
        assert language.vocabulary.control_id("<image>") == 480
        assert 480 not in language.vocabulary.tokenize("a <image> typed by a user")


@pytest.mark.parametrize(
    ("settings", "asked", "expected"),
    [
        ({"legacy": False}, "", "bare"),  # LLaVA-1.5
        ({"legacy": True}, "", "prefix"),
        ({"legacy": None}, "", "prefix"),
        ({}, "", "prefix"),  # Vicuna v1.1 and v1.3
        ({"legacy": False}, "cut", "cut"),
        ({}, "bare", "bare"),
    ],
)
def test_the_legacy_flag_decides_about_text_behind_control_tokens(
    settings: dict[str, Any], asked: Any, expected: str, tmp_path: Path
) -> None:
    config = replace(spm_folder(tmp_path), after_control=asked)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    assert read_after_control(tmp_path, config) == expected
    (tmp_path / "tokenizer.model").unlink()  # a byte-level vocabulary has no dummy prefix
    assert read_after_control(tmp_path, config) == (asked or "prefix")


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_padding_without_an_embedding_is_left_out(name: str, tmp_path: Path) -> None:
    """As in the first copies of Llama 2; a token that a prompt may have needs its row."""
    size = len(sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model()))
    config = json_folder(tmp_path, True) if name == "tokenizer.json" else spm_folder(tmp_path)
    config = replace(config, text=replace(config.text, vocab_size=size))
    wanted = read_tokenizer(tmp_path, config)
    path = tmp_path / ("added_tokens.json" if name == "tokenizer.model" else name)
    for text in ("<pad>", "<object>"):
        raw: dict[str, Any] = {text: size}
        if name == "tokenizer.json":
            raw = json.loads(path.read_text("utf-8"))
            raw["added_tokens"] = [*raw["added_tokens"][:3], {"id": size, "content": text, "special": True}]
        path.write_text(json.dumps(raw), "utf-8")
        if text == "<pad>":
            assert read_tokenizer(tmp_path, config) == wanted
            continue
        with pytest.raises(CheckpointError, match=f"{size + 1} tokens, the embedding table only {size} rows"):
            read_tokenizer(tmp_path, config)


def test_a_tokenizer_without_a_prefix_space_has_none(tmp_path: Path) -> None:
    """`add_prefix_space` counts in both of transformers 4.57's tokenizers where `legacy` is false; 5 passes it over."""
    config = spm_folder(tmp_path)
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": False, "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    vocabulary = read_tokenizer(tmp_path, config)
    texts = [text for text in TEXTS if "</s>" not in text]
    with closing(engine(tmp_path, vocabulary)) as language:
        ours = [language.vocabulary.tokenize(text) for text in texts]
    for fast in () if hugging_face.V5 else (True, False):
        theirs = AutoTokenizer.from_pretrained(tmp_path, use_fast=fast)
        assert ours == [theirs.encode(text, add_special_tokens=False) for text in texts]


@pytest.mark.parametrize("legacy", [{}, {"legacy": None}, {"legacy": True}])
def test_a_prefix_space_that_tokenizers_disagree_about_is_refused(legacy: dict[str, Any], tmp_path: Path) -> None:
    """What LLaVA's own code and transformers' fast tokenizer do with it are two answers."""
    config = spm_folder(tmp_path)
    settings = {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", **legacy}
    path = tmp_path / "tokenizer_config.json"
    for prefix in (True, None):
        path.write_text(json.dumps({**settings, "add_prefix_space": prefix}), "utf-8")
        assert read_tokenizer(tmp_path, config).add_space_prefix
    path.write_text(json.dumps({**settings, "add_prefix_space": False}), "utf-8")
    if not hugging_face.V5:
        both = [AutoTokenizer.from_pretrained(tmp_path, use_fast=fast) for fast in (True, False)]
        assert both[0].tokenize("Hello") != both[1].tokenize("Hello")
    with pytest.raises(CheckpointError, match="If the model was trained without a space before texts"):
        read_tokenizer(tmp_path, config)
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(add_dummy_prefix=False))  # has none, as Yi's
    assert not read_tokenizer(tmp_path, config).add_space_prefix


def test_pieces_that_a_layout_has_as_control_tokens_become_some(tmp_path: Path) -> None:
    """Yi's `<|im_start|>` is a user-defined piece of its tokenizer.model and no special token in any other file."""
    settings: dict[str, Any] = {"add_dummy_prefix": False, "user_defined_symbols": "<|im_start|>,<|im_end|>"}
    config = replace(spm_folder(tmp_path, **settings), template="chatml_direct")
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false, "eos_token": "<|im_end|>"}', "utf-8")
    vocabulary, theirs = read_tokenizer(tmp_path, config), sentencepiece.SentencePieceProcessor()
    theirs.LoadFromSerializedProto(sentencepiece_model(**settings))
    model = engine(tmp_path, vocabulary)
    with closing(model):
        pieces = render("chatml_direct", [Message("user", "What is it?")])
        ids = encode(pieces, model.vocabulary.tokenize, model.vocabulary.control_id)
    assert ids == theirs.Encode("".join(piece.text for piece in pieces))


def test_image_markers_must_be_special_tokens(tmp_path: Path) -> None:
    config = replace(spm_folder(tmp_path), image_markers=("<im_start>", "<im_end>"))
    (tmp_path / "added_tokens.json").write_text('{"<im_patch>": 480, "<im_start>": 481}', "utf-8")
    with pytest.raises(CheckpointError, match="image markers <im_end> are not special tokens"):
        read_tokenizer(tmp_path, config)
    (tmp_path / "added_tokens.json").write_text('{"<im_start>": 480, "<im_end>": 481}', "utf-8")
    assert read_tokenizer(tmp_path, config).types[480:482] == (3, 3)


def test_a_layout_that_writes_a_special_token_as_text_is_refused(tmp_path: Path) -> None:
    """Since Mistral-7B v0.3 the brackets are tokens, which no text becomes; other layouts do not have them."""
    config = spm_folder(tmp_path, control_symbols="[INST],[/INST]")
    assert read_tokenizer(tmp_path, config).types[3:5] == (3, 3)
    with pytest.raises(CheckpointError, match=r"'mistral_instruct' has '\[/INST\]' as text, .* as --template"):
        read_tokenizer(tmp_path, replace(config, template="mistral_instruct"))


def test_a_layout_that_has_captions_only_is_admitted(tmp_path: Path) -> None:
    config = spm_folder(tmp_path)
    assert read_tokenizer(tmp_path, replace(config, template="plain")) == read_tokenizer(tmp_path, config)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_type": "unigram", "vocab_size": 370}, "unigram"),
        ({"byte_fallback": False, "vocab_size": 300}, "no byte pieces"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises"),
        ({"remove_extra_whitespaces": True}, "removes extra spaces"),
    ],
)
def test_sentencepiece_that_llama_cpp_would_get_wrong_is_refused(
    settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    config = spm_folder(tmp_path, **settings)
    with pytest.raises(CheckpointError, match=said):
        read_tokenizer(tmp_path, config)


def json_folder(folder: Path, legacy: bool) -> LlavaConfig:
    """The same vocabulary as transformers writes it into a tokenizer.json, without a tokenizer.model."""
    source = folder / "source"
    config = spm_folder(source)
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (source / "tokenizer_config.json").write_text(json.dumps({**settings, "legacy": legacy}), "utf-8")
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    (folder / "tokenizer.model").unlink(missing_ok=True)
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return config


@pytest.mark.parametrize("legacy", [True, False])
def test_a_tokenizer_json_of_llama_is_its_sentencepiece(legacy: bool, tmp_path: Path) -> None:
    """What transformers 5 saves."""
    config = json_folder(tmp_path, legacy)
    vocabulary = read_tokenizer(tmp_path, config)
    wanted = read_tokenizer(tmp_path / "source", config)
    assert replace(vocabulary, scores=wanted.scores) == wanted
    original = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    with closing(engine(tmp_path, vocabulary)) as language:
        assert [text for text in TEXTS if language.vocabulary.tokenize(text) != original.encode(text)] == []


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ({"pre_tokenizer": {**METASPACE, "prepend_scheme": "first"}}, "bare"),
        ({"pre_tokenizer": {**METASPACE, "prepend_scheme": "always"}}, "prefix"),
        ({"normalizer": {"type": "Sequence", "normalizers": [PREPEND, REPLACE]}}, "prefix"),
        (
            {
                "normalizer": {"type": "Sequence", "normalizers": [REPLACE, DOUBLE]},
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{**METASPACE, "prepend_scheme": "always"}]},
            },
            "prefix",
        ),
    ],
)
def test_its_prefix_decides_about_text_behind_control_tokens(
    stage: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    config = json_folder(tmp_path, True)
    path = tmp_path / "tokenizer.json"
    raw = {**json.loads(path.read_text("utf-8")), "normalizer": None, "pre_tokenizer": None}
    path.write_text(json.dumps({**raw, **stage}), "utf-8")
    assert read_after_control(tmp_path, config) == expected
    assert read_tokenizer(tmp_path, config).add_space_prefix
    path.write_text(json.dumps({**raw, "normalizer": REPLACE}), "utf-8")
    assert not read_tokenizer(tmp_path, config).add_space_prefix
    assert read_after_control(tmp_path, config) == "prefix"  # there is none, so both are the same


@pytest.mark.parametrize("damage", ["missing", "moved", "spaces", "bytes"])
def test_a_tokenizer_json_of_llama_that_would_come_out_wrong_is_refused(damage: str, tmp_path: Path) -> None:
    config = json_folder(tmp_path, True)
    path = tmp_path / "tokenizer.json"
    raw = json.loads(path.read_text("utf-8"))
    merges, said = raw["model"]["merges"], "merge order that scores cannot express"
    if damage == "missing":
        del merges[3]
    elif damage == "moved":  # two ways to one piece with another piece between them
        first = next(n for n, (a, b) in enumerate(pairwise(merges)) if "".join(a) == "".join(b))
        merges.append(merges.pop(first))
    elif damage == "spaces":
        raw |= {"normalizer": {"type": "NFC"}}
        said = "handles spaces in an unsupported way"
    else:
        raw["model"]["vocab"]["byte"] = raw["model"]["vocab"].pop("<0x41>")
        said = "no byte pieces"
    path.write_text(json.dumps(raw), "utf-8")
    with pytest.raises(CheckpointError, match=said):
        read_tokenizer(tmp_path, config)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped"])
def test_a_damaged_sentencepiece_file_is_one_sentence(damage: str, tmp_path: Path) -> None:
    config = write_folder(tmp_path, 512, "vicuna_v1")
    whole = sentencepiece_model()
    content = {"empty": b"", "text": b"<html>not it</html>", "cut": whole[:3001], "flipped": b"\xff" * 40 + whole}
    (tmp_path / "tokenizer.model").write_bytes(content[damage])
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        read_tokenizer(tmp_path, config)


# --- byte-level BPE --------------------------------------------------------------------------------------------

BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
PLAIN_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
CUTS = {
    "gpt-2": BYTE_LEVEL,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL]),
    "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"), PLAIN_BYTES]),
}


@cache
def bpe(pre: str) -> str:
    """tokenizer.json of a small trained tokenizer, ChatML's tokens in front."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = CUTS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=list(micro.CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return str(tokenizer.to_str())


@pytest.mark.parametrize("pre", list(CUTS))
def test_byte_level_bpe_comes_out_token_by_token(pre: str, tmp_path: Path) -> None:
    config = write_folder(tmp_path, 512)
    (tmp_path / "tokenizer.json").write_text(bpe(pre), "utf-8")
    vocabulary = read_tokenizer(tmp_path, config)
    assert vocabulary.pre == pre
    raw = json.loads(bpe(pre))
    raw["added_tokens"] = []  # in prompts, user text never becomes a control token
    original = Tokenizer.from_str(json.dumps(raw))
    with closing(engine(tmp_path, vocabulary)) as language:
        wrong = [text for text in TEXTS if language.vocabulary.tokenize(text) != original.encode(text).ids]
        assert [language.vocabulary.control_id(name) for name in micro.CONTROL_TOKENS] == [0, 1, 2]
        assert (
            b"".join(language.vocabulary.piece(i) for i in language.vocabulary.tokenize("Köln 🙂\n")).decode()
            == "Köln 🙂\n"
        )
    assert wrong == []


def test_the_texts_tell_pre_tokenizers_apart() -> None:
    found = {pre: [Tokenizer.from_str(bpe(pre)).encode(text).tokens for text in TEXTS] for pre in CUTS}
    assert found["gpt-2"] != found["smollm"]
    assert found["gpt-2"] != found["llama-bpe"]


def change(path: tuple[str, ...], value: Any) -> str:
    raw = json.loads(bpe("smollm"))
    place = raw
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(raw)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (change(("normalizer",), {"type": "NFC"}), "normalises"),
        (change(("model", "byte_fallback"), True), "tokenizer.model"),
        (change(("model", "ignore_merges"), True), "ignore_merges"),
        (change(("model", "dropout"), 0.1), "at random"),
        (change(("model", "end_of_word_suffix"), "</w>"), "word ends"),
        (change(("model", "type"), "WordPiece"), "not a BPE"),
        (change(("model",), None), "not a BPE"),
        (change(("pre_tokenizer",), {"type": "Whitespace"}), "unsupported pre-tokenizer"),
        (change(("pre_tokenizer",), {"type": "ByteLevel", "add_prefix_space": True}), "unsupported pre-tokenizer"),
        (change(("pre_tokenizer",), None), "unsupported pre-tokenizer"),
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
    ],
)
def test_byte_level_bpe_that_llama_cpp_would_get_wrong_is_refused(content: str, said: str, tmp_path: Path) -> None:
    config = write_folder(tmp_path, 512)
    (tmp_path / "tokenizer.json").write_text(content, "utf-8")
    with pytest.raises(CheckpointError, match=said):
        read_tokenizer(tmp_path, config)


def test_bos_and_eos_are_the_tokenizers_own_first(tmp_path: Path) -> None:
    """Early LLaVA configs name the wrong ids, as this one does."""
    config = write_folder(tmp_path, 512, bos_token_id=0, eos_token_id=1)
    (tmp_path / "tokenizer.json").write_text(bpe("smollm"), "utf-8")
    found = read_tokenizer(tmp_path, config)
    assert (found.bos, found.eos) == (0, 1)
    names = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names), "utf-8")
    found = read_tokenizer(tmp_path, config)
    assert (found.bos, found.eos) == (1, 2)


def test_a_post_processor_that_adds_bos_is_seen(tmp_path: Path) -> None:
    config = write_folder(tmp_path, 512)
    single = [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    content = change(("post_processor",), {"type": "TemplateProcessing", "single": single})
    (tmp_path / "tokenizer.json").write_text(content, "utf-8")
    assert read_tokenizer(tmp_path, config).add_bos
    (tmp_path / "tokenizer.json").write_text(bpe("smollm"), "utf-8")
    assert not read_tokenizer(tmp_path, config).add_bos


def test_vocabularies_that_cannot_fit_are_refused(tmp_path: Path) -> None:
    config = write_folder(tmp_path, 100)
    with pytest.raises(MissingError, match="no tokenizer"):
        read_tokenizer(tmp_path, config)
    (tmp_path / "tokenizer.json").write_text(bpe("smollm"), "utf-8")
    with pytest.raises(CheckpointError, match="480 tokens, the embedding table only 100 rows"):
        read_tokenizer(tmp_path, config)
    config = write_folder(tmp_path, 512, "vicuna_v1")
    with pytest.raises(CheckpointError, match=r"needs the special tokens <s>, </s>.* as --template"):
        read_tokenizer(tmp_path, config)
    config = write_folder(tmp_path, 512, eos_token_id=600)
    with pytest.raises(CheckpointError, match="eos 600"):
        read_tokenizer(tmp_path, config)
    config = write_folder(tmp_path, 512)
    (tmp_path / "added_tokens.json").write_text('{"<far>": 1000000000}', "utf-8")
    with pytest.raises(CheckpointError, match="1000000001 tokens"):
        read_tokenizer(tmp_path, config)
    for added in ('{"<odd>": "x"}', '{"<odd>": Infinity}', r'{"half a \ud83d": 500}'):
        (tmp_path / "added_tokens.json").write_text(added, "utf-8")
        with pytest.raises(CheckpointError, match="wrong type"):
            read_tokenizer(tmp_path, config)
    (tmp_path / "added_tokens.json").unlink()
    raw = json.loads(bpe("smollm"))
    raw["added_tokens"][0]["content"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), "utf-8")
    with pytest.raises(CheckpointError, match="wrong type"):
        read_tokenizer(tmp_path, config)
