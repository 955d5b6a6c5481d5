"""A checkpoint's tokenizer -> the vocabulary fields of a GGUF.

Two kinds are supported: SentencePiece (`tokenizer.model`, LLaMA and Vicuna, or the same as `tokenizer.json`) and
byte-level BPE (`tokenizer.json`, GPT-2 style). llama.cpp implements both, controlled by a few fields; a tokenizer that
it would not reproduce is refused here rather than tokenized wrongly. The SentencePiece file is a protobuf of which only
five fields are needed, so it is parsed by hand.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llava_edge import protobuf
from llava_edge.errors import CheckpointError, MissingError
from llava_edge.export import llama_json
from llava_edge.export.tensors import read_json, refuse_placeholder
from llava_edge.models.config import LlavaConfig
from llava_edge.prompt import AfterControl
from llava_edge.templates import get_template

# Token types, the same numbers in SentencePiece and GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

ADDED_SCORE, PAD_SCORE = -1000.0, -10000.0  # the values of llama.cpp's own converter

# Names of padding tokens. Llama 2 was first published with one more token than embedding rows, and copies still are.
_PADDING = ("<pad>", "[PAD]", "<PAD>")

# The split pattern of LLaMA 3's tokenizer.json, which llama.cpp knows as "llama-bpe".
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer fields of a GGUF. `tokens`, `scores` and `types` have one entry per embedding row."""

    model: Literal["llama", "gpt2"]
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    add_bos: bool = True
    add_space_prefix: bool = False
    pre: str = "default"
    merges: tuple[str, ...] = ()
    unknown: int | None = None
    bos: int = 1
    eos: int = 2

    def write(self, writer: Any) -> None:
        """Add the fields to a `gguf.GGUFWriter`."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.model == "llama":
            writer.add_token_scores(self.scores)
        else:
            writer.add_token_merges(self.merges)
        writer.add_bos_token_id(self.bos)
        writer.add_eos_token_id(self.eos)
        if self.unknown is not None:
            writer.add_unk_token_id(self.unknown)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(self.add_space_prefix)


def read_tokenizer(folder: Path, config: LlavaConfig) -> Vocabulary:
    """Read `tokenizer.model` or `tokenizer.json`. Raises `MissingError`, or `CheckpointError` for an unsupported one.

    Embedding rows after the tokenizer's last token become unused `[PADi]` tokens.
    """
    try:
        vocabulary = _pad(_read(folder, config), config.text.vocab_size)
        "".join((*vocabulary.tokens, *vocabulary.merges)).encode()  # all are valid strings
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, IndexError) as error:
        raise CheckpointError(f"The tokenizer in {folder} has a value of the wrong type: {error!r}.") from error
    _check_vocabulary(folder, config, vocabulary)
    return vocabulary


def _pad(vocabulary: Vocabulary, rows: int) -> Vocabulary:
    size = len(vocabulary.tokens)
    return replace(
        vocabulary,
        tokens=(*vocabulary.tokens, *(f"[PAD{i}]" for i in range(size, rows))),
        types=vocabulary.types + (UNUSED,) * (rows - size),
        scores=vocabulary.scores + (PAD_SCORE,) * (rows - size),
    )


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
    raw = read_json(path) if path.is_file() else {}
    return (llama_json.dummy_prefix(path, raw) if llama_json.is_llama(raw) else None) or "prefix"


def _read(folder: Path, config: LlavaConfig) -> Vocabulary:
    rows = config.text.vocab_size
    if (folder / "tokenizer.model").is_file():
        vocabulary = _sentencepiece(folder / "tokenizer.model")
        vocabulary = replace(vocabulary, add_space_prefix=vocabulary.add_space_prefix and _prefix_space(folder))
    elif (folder / "tokenizer.json").is_file():
        path = folder / "tokenizer.json"
        raw = read_json(path)
        vocabulary = (_llama_json if llama_json.is_llama(raw) else _byte_level_bpe)(path, raw, rows)
    else:
        raise MissingError(f"{folder} has no tokenizer; expected tokenizer.model or tokenizer.json.")
    added = {i: entry for i, entry in _added_tokens(folder).items() if not _is_rowless_padding(i, entry[0], rows)}
    size = max([len(vocabulary.tokens), *(i + 1 for i in added)])
    _check_size(folder, size, rows)
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


def _check_size(folder: Path, size: int, rows: int) -> None:
    if size > rows:
        raise CheckpointError(f"The tokenizer in {folder} has {size} tokens, the embedding table only {rows} rows.")


def _is_rowless_padding(token: int, text: Any, rows: int) -> bool:
    """Whether a token only fills up batches, so that no prompt has it, and has no embedding."""
    return token >= rows and text in _PADDING


def _added_tokens(folder: Path) -> dict[int, tuple[str, bool]]:
    """id -> (text, special) of tokens added to or replacing the trained ones, from the files that may list them."""
    added: dict[int, tuple[str, bool]] = {}
    if (folder / "added_tokens.json").is_file():
        added = {int(i): (text, True) for text, i in read_json(folder / "added_tokens.json").items()}
    for i, entry in _tokenizer_config(folder).get("added_tokens_decoder", {}).items():
        added[int(i)] = (entry["content"], bool(entry.get("special", False)))
    if (folder / "tokenizer.json").is_file():
        for entry in read_json(folder / "tokenizer.json").get("added_tokens", []):
            added[int(entry["id"])] = (entry["content"], bool(entry.get("special", False)))
    return added


def _apply_added(folder: Path, vocabulary: Vocabulary, added: dict[int, tuple[str, bool]], size: int) -> Vocabulary:
    trained, padded = len(vocabulary.tokens), _pad(vocabulary, size)
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
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def _check_vocabulary(folder: Path, config: LlavaConfig, vocabulary: Vocabulary) -> None:
    size = len(vocabulary.tokens)
    if max(vocabulary.bos, vocabulary.eos) >= size:
        raise CheckpointError(f"{folder} has bos {vocabulary.bos} and eos {vocabulary.eos}, but only {size} tokens.")
    if len(set(vocabulary.tokens)) != size:
        raise CheckpointError(f"The tokenizer in {folder} has the same token twice.")
    control = {text for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == CONTROL}
    missing = [text for text in get_template(config.template).controls if text not in control]
    if missing:
        raise CheckpointError(
            f"The prompt template {config.template!r} needs the special tokens {', '.join(missing)}, "
            f"which the tokenizer in {folder} lacks; pass the layout that the model was trained with as --template."
        )
    missing = [text for text in config.image_markers if text not in control]
    if missing:
        raise CheckpointError(
            f"The image markers {', '.join(missing)} are not special tokens of the tokenizer in {folder}."
        )


# --- SentencePiece ---------------------------------------------------------------------------------------------


def _sentencepiece(path: Path) -> Vocabulary:
    """Field numbers are those of sentencepiece_model.proto."""
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    value: Any
    refuse_placeholder(path)
    try:
        for field, value in protobuf.fields(path.read_bytes()):
            if field == 1:
                piece: dict[int, Any] = dict(protobuf.fields(value))
                score = struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0]
                pieces.append((piece[1].decode("utf-8"), score, piece.get(3, NORMAL)))
            elif field == 2:
                trainer = dict(protobuf.fields(value))
            elif field == 3:
                normalizer = dict(protobuf.fields(value))
    except (IndexError, KeyError, ValueError, struct.error, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is not a SentencePiece model ({error!r}); download it again.") from error
    if not pieces:
        raise CheckpointError(f"{path} is not a SentencePiece model: it has no pieces; download it again.")
    # llama.cpp's tokenizer merges by score, falls back to bytes, and does not normalise text.
    rules = {
        "is a unigram model; only BPE is supported": trainer.get(3, 1) == 2,
        "has no byte pieces to fall back to": sum(kind == BYTE for _, _, kind in pieces) == 256,
        "normalises text; only identity is supported": normalizer.get(1, b"") in (b"", b"identity"),
        "removes extra spaces, which llama.cpp does not": not normalizer.get(4, 1),
    }
    _require(path, rules)
    tokens, scores, types = zip(*pieces, strict=True)
    return Vocabulary(
        model="llama",
        tokens=tokens,
        types=types,
        scores=scores,
        unknown=types.index(UNKNOWN) if UNKNOWN in types else None,
        add_space_prefix=bool(normalizer.get(3, 1)),
    )


# --- tokenizer.json --------------------------------------------------------------------------------------------


def _bpe(path: Path, raw: dict[str, Any], rows: int) -> tuple[dict[str, Any], tuple[str, ...], tuple[int, ...]]:
    """The model of a BPE file, its tokens and their types. Refuses what neither kind supports."""
    model = raw.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise CheckpointError(f"{path} is not a BPE tokenizer; expected a model of type BPE with a vocab.")
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    _require(path, {"drops merges at random": not model.get("dropout"), "marks word ends or beginnings": not affixes})
    by_id = {int(i): text for text, i in model["vocab"].items()}
    added = {int(entry["id"]): entry["content"] for entry in raw.get("added_tokens", [])}
    by_id |= {i: text for i, text in added.items() if not _is_rowless_padding(i, text, rows)}
    size = max(by_id, default=-1) + 1
    _check_size(path.parent, size, rows)
    tokens = tuple(by_id.get(i, f"[PAD{i}]") for i in range(size))
    return model, tokens, tuple(NORMAL if i in by_id else UNUSED for i in range(size))


def _require(path: Path, rules: dict[str, bool]) -> None:
    for problem, good in rules.items():
        if not good:
            raise CheckpointError(f"The tokenizer {path} {problem}, so its tokens would come out wrong.")


def _llama_json(path: Path, raw: dict[str, Any], rows: int) -> Vocabulary:
    """The same as `_sentencepiece`, from transformers' conversion of a tokenizer.model."""
    prefix = llama_json.dummy_prefix(path, raw)
    model, tokens, types = _bpe(path, raw, rows)
    rules = {
        "has no byte pieces to fall back to": all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256)),
        "looks whole words up before it merges": not model.get("ignore_merges"),
    }
    _require(path, rules)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    scores = llama_json.merge_scores(path, list(model["vocab"]), merges)
    kinds = {f"<0x{byte:02X}>": BYTE for byte in range(256)} | {"<unk>": UNKNOWN}
    return Vocabulary(
        model="llama",
        tokens=tokens,
        types=tuple(kinds.get(text, kind) for text, kind in zip(tokens, types, strict=True)),
        scores=tuple(scores.get(text, 0.0) for text in tokens),
        unknown=tokens.index("<unk>") if "<unk>" in tokens else None,
        add_space_prefix=prefix is not None,
    )


def _byte_level_bpe(path: Path, raw: dict[str, Any], rows: int) -> Vocabulary:
    model, tokens, types = _bpe(path, raw, rows)
    pre = _pre_tokenizer(path, raw)
    rules = {
        "normalises text, which llama.cpp would not": not raw.get("normalizer"),
        f"and llama.cpp's {pre!r} differ in ignore_merges": bool(model.get("ignore_merges")) == (pre == "llama-bpe"),
    }
    _require(path, rules)
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", []))
    return Vocabulary(
        model="gpt2",
        tokens=tokens,
        types=types,
        scores=(0.0,) * len(tokens),
        add_bos=_adds_bos(raw),
        pre=pre,
        merges=tuple(merges),
    )


def _pre_tokenizer(path: Path, raw: dict[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer, detected by its content."""
    stages = raw.get("pre_tokenizer") or {}
    stages = stages.get("pretokenizers", []) if stages.get("type") == "Sequence" else [stages]
    kinds = [stage.get("type") for stage in stages]
    byte_level = stages[-1] if kinds and kinds[-1] == "ByteLevel" else {}
    if byte_level and not byte_level.get("add_prefix_space", True):
        before, regex = stages[:-1], byte_level.get("use_regex", True)
        if not before and regex:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and before[0].get("individual_digits") and regex:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not regex:
            split = before[0]
            if split.get("pattern") == {"Regex": _LLAMA3_SPLIT} and split.get("behavior") == "Isolated":
                return "llama-bpe"
    raise CheckpointError(
        f"{path} has an unsupported pre-tokenizer ({json.dumps(stages)[:200]}); supported are GPT-2's, "
        "SmolLM's and LLaMA 3's byte-level pre-tokenizers without a prefix space."
    )


def _adds_bos(raw: dict[str, Any]) -> bool:
    """Whether the post-processor adds a special token before the text."""
    stages = raw.get("post_processor") or {}
    stages = stages.get("processors", []) if stages.get("type") == "Sequence" else [stages]
    return any(
        stage.get("type") == "TemplateProcessing" and "SpecialToken" in (stage.get("single") or [{}])[0]
        for stage in stages
    )
