"""Detects a checkpoint's prompt layout from its chat template, if it has one.

Templates are Jinja programs, which are not executed: certain strings in them tell the layouts apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_edge.errors import CheckpointError
from llava_edge.export.tensors import read_json_if_any
from llava_edge.templates import TEMPLATES, Style

# String in a chat template -> the style of prompt layout it belongs to; None for unsupported ones.
_MARKERS: dict[str, Style | None] = {
    "USER:": "two",
    "['role'].upper()": "two",  # LLaVA-1.5's
    "[INST]": "llama_2",
    "<|im_start|>": "chatml",
    "###": "single",
    "<|user|>": None,  # Phi-3
    "<|start_header_id|>": None,  # LLaMA 3
    "<start_of_turn>": None,  # Gemma
}


def read_chat_template(folder: Path) -> str:
    """The chat template of a tokenizer or processor in `folder`; empty if it has none."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text("utf-8", "replace")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if text := _join_templates(read_json_if_any(folder / name).get("chat_template")):
            return text
    return ""


def resolve_template(text: str, template: str, where: Path) -> str:
    """`template`, which was guessed, or the layout that the chat template `text` shows instead.

    Raises `CheckpointError` if the text contradicts `template` without naming a single other layout.
    """
    found_markers = {marker: style for marker, style in _MARKERS.items() if marker in text}
    if not found_markers or TEMPLATES[template].style in found_markers.values():
        return template
    if "two" in found_markers.values():
        return "vicuna_v1"
    names = [name for name, layout in TEMPLATES.items() if layout.style in found_markers.values()]
    layouts = f"; {', '.join(names)} have it" if names else "; no supported layout has it"
    raise CheckpointError(
        f"The chat template of {where} has {next(iter(found_markers))!r}, which the prompt layout {template!r} "
        f"expected for it does not have{layouts}. Pass the layout it was trained with, if supported, as --template."
    )


def _join_templates(value: Any) -> str:
    """The template; if there are several named ones, all of them joined."""
    if isinstance(value, str):
        return value
    parts = [part.get("template") for part in value if isinstance(part, dict)] if isinstance(value, list) else []
    return "\n".join(part for part in parts if isinstance(part, str))
