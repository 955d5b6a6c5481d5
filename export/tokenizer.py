"""A checkpoint's tokenizer -> the vocabulary fields of a GGUF.

Two kinds are supported: SentencePiece (`tokenizer.model`, LLaMA and Vicuna, or the same as `tokenizer.json`) and
byte-level BPE (`tokenizer.json`, GPT-2 style). llama.cpp implements both, controlled by a few fields; a tokenizer that
it would not reproduce is refused here rather than tokenized wrongly.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_edge.errors import CheckpointError, MissingError
from llava_edge.export import llama_json
from llava_edge.export.byte_level_json import read_byte_level
from llava_edge.export.sentencepiece_model import read_sentencepiece
from llava_edge.export.tensors import read_json, read_json_if_any
from llava_edge.export.vocabulary import (
    BYTE,
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    check_size,
    check_template,
    control_tokens,
    is_rowless_padding,
    pad,
)
from llava_edge.models.config import LlavaConfig
from llava_edge.prompt import AfterControl
from llava_edge.templates import get_template

ADDED_SCORE = -1000.0  # the value of llama.cpp's own converter


def read_tokenizer(folder: Path, config: LlavaConfig) -> Vocabulary:
    """Read `tokenizer.model` or `tokenizer.json`. Raises `MissingError`, or `CheckpointError` for an unsupported one.

    Embedding rows after the tokenizer's last token become unused `[PADi]` tokens.
    """
    try:
        vocabulary = _with_controls(pad(_read(folder, config), config.text.vocab_size), config)
        "".join((*vocabulary.tokens, *vocabulary.merges)).encode()  # all are valid strings
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, IndexError) as error:
        raise CheckpointError(f"The tokenizer in {folder} has a value of the wrong type: {error!r}.") from error
    _check_vocabulary(folder, config, vocabulary)
    return vocabulary


def _with_controls(vocabulary: Vocabulary, config: LlavaConfig) -> Vocabulary:
    """Make what prompts have as control tokens be some: Yi's `<|im_start|>` is a piece that any text can become."""
    controls = {*get_template(config.template).controls, *config.image_markers}
    pairs = zip(vocabulary.tokens, vocabulary.types, strict=True)
    types = (CONTROL if kind == USER_DEFINED and text in controls else kind for text, kind in pairs)
    return replace(vocabulary, types=tuple(types))


def read_after_control(folder: Path, config: LlavaConfig) -> AfterControl:
    """How text after a control token is tokenized, as by transformers since 4.34 for SentencePiece.

    `legacy` in tokenizer_config.json decides, true if missing; LLaVA-1.5 has false. Versions before 4.34, with which it
    was trained, had a third way, which only config.json can select. A tokenizer.json alone says it itself.
    """
    if config.after_control:
        return config.after_control
    if (folder / "tokenizer.model").is_file():
        return "bare" if _tokenizer_config(folder).get("legacy") is False else "prefix"
    path = folder / "tokenizer.json"
    raw = read_json_if_any(path)
    return (llama_json.dummy_prefix(path, raw) if llama_json.is_llama(raw) else None) or "prefix"


def _read(folder: Path, config: LlavaConfig) -> Vocabulary:
    rows = config.text.vocab_size
    if (folder / "tokenizer.model").is_file():
        vocabulary = read_sentencepiece(folder / "tokenizer.model")
        vocabulary = replace(vocabulary, add_space_prefix=vocabulary.add_space_prefix and _prefix_space(folder))
    elif (folder / "tokenizer.json").is_file():
        path = folder / "tokenizer.json"
        raw = read_json(path)
        vocabulary = (llama_json.read_llama if llama_json.is_llama(raw) else read_byte_level)(path, raw, rows)
    else:
        raise MissingError(f"{folder} has no tokenizer; expected tokenizer.model or tokenizer.json.")
    added = {i: entry for i, entry in _added_tokens(folder).items() if not is_rowless_padding(i, entry[0], rows)}
    size = max([len(vocabulary.tokens), *(i + 1 for i in added)])
    check_size(folder, size, rows)
    return _apply_special_ids(folder, config, _apply_added(folder, vocabulary, added, size))


def _prefix_space(folder: Path) -> bool:
    """Whether tokenizer_config.json leaves SentencePiece its dummy prefix. Raises `CheckpointError` if that is open."""
    settings = _tokenizer_config(folder)
    if settings.get("add_prefix_space") is not False:
        return True
    if settings.get("legacy") is not False:
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'} sets add_prefix_space to false, which only some of transformers' "
            "tokenizers follow where legacy is not false. If the model was trained without a space before texts, set "
            "legacy to false; otherwise remove add_prefix_space."
        )
    return False


def _added_tokens(folder: Path) -> dict[int, tuple[str, bool]]:
    """id -> (text, special) of tokens added to or replacing the trained ones, from the files that may list them."""
    added = {int(i): (text, True) for text, i in read_json_if_any(folder / "added_tokens.json").items()}
    for i, entry in _tokenizer_config(folder).get("added_tokens_decoder", {}).items():
        added[int(i)] = (entry["content"], bool(entry.get("special", False)))
    for entry in read_json_if_any(folder / "tokenizer.json").get("added_tokens", []):
        added[int(entry["id"])] = (entry["content"], bool(entry.get("special", False)))
    return added


def _apply_added(folder: Path, vocabulary: Vocabulary, added: dict[int, tuple[str, bool]], size: int) -> Vocabulary:
    trained, padded = len(vocabulary.tokens), pad(vocabulary, size)
    tokens, types, scores = list(padded.tokens), list(padded.types), list(padded.scores)
    for i, (text, special) in added.items():
        kind = CONTROL if special else USER_DEFINED
        if i >= trained:
            tokens[i], types[i], scores[i] = text, kind, ADDED_SCORE
        elif tokens[i] != text:
            raise CheckpointError(f"{folder} gives token {i} two names, {tokens[i]!r} and {text!r}.")
        elif types[i] not in (UNKNOWN, CONTROL, BYTE):
            types[i] = kind
    return replace(padded, tokens=tuple(tokens), types=tuple(types), scores=tuple(scores))


def _apply_special_ids(folder: Path, config: LlavaConfig, vocabulary: Vocabulary) -> Vocabulary:
    """Set bos and eos from the tokenizer, else from config.json (early LLaVA configs have wrong ids)."""
    settings = _tokenizer_config(folder)

    def find(key: str, fallback: int) -> int:
        entry = settings.get(key)
        text = entry.get("content") if isinstance(entry, dict) else entry
        return vocabulary.tokens.index(text) if text in vocabulary.tokens else fallback

    return replace(
        vocabulary,
        bos=find("bos_token", config.text.bos_token_id),
        eos=find("eos_token", config.text.eos_token_id),
        add_bos=bool(settings.get("add_bos_token", vocabulary.add_bos)),
    )


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    return read_json_if_any(folder / "tokenizer_config.json")


def _check_vocabulary(folder: Path, config: LlavaConfig, vocabulary: Vocabulary) -> None:
    size = len(vocabulary.tokens)
    if max(vocabulary.bos, vocabulary.eos) >= size:
        raise CheckpointError(f"{folder} has bos {vocabulary.bos} and eos {vocabulary.eos}, but only {size} tokens.")
    if len(set(vocabulary.tokens)) != size:
        raise CheckpointError(f"The tokenizer in {folder} has the same token twice.")
    controls = control_tokens(vocabulary.tokens, vocabulary.types)
    check_template(f"the tokenizer in {folder}", config.template, controls)
    if missing := [marker for marker in config.image_markers if marker not in controls]:
        raise CheckpointError(
            f"The image markers {', '.join(missing)} are not special tokens of the tokenizer in {folder}."
        )
