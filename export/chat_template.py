"""What a chat template, where there is one, says about the prompt layout that a checkpoint was trained with.

Templates are programs (Jinja), which are not run here: some texts in them tell the layouts apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_edge.errors import CheckpointError
from llava_edge.export.tensors import read_json
from llava_edge.templates import TEMPLATES, Style

# Text in a chat template -> the style of prompt layout that it belongs to; none of ours for the last ones.
_MARKS: dict[str, Style | None] = {
    "USER:": "two",
    "['role'].upper()": "two",  # LLaVA-1.5's
    "[INST]": "llama_2",
    "<|im_start|>": "chatml",
    "###": "single",
    "<|user|>": None,  # Phi-3
    "<|start_header_id|>": None,  # LLaMA 3
    "<start_of_turn>": None,  # Gemma
}


def of_folder(folder: Path) -> str:
    """The chat template of a tokenizer or processor in `folder`; empty if it has none."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text("utf-8", "replace")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        path = folder / name
        found = _text(read_json(path).get("chat_template")) if path.is_file() else ""
        if found:
            return found
    return ""


def checked(text: str, template: str, where: Path) -> str:
    """`template`, a guess, or the layout that a chat template's text shows in its place.

    Raises `CheckpointError` if the text shows another layout, and not which.
    """
    seen = {mark: style for mark, style in _MARKS.items() if mark in text}
    if not seen or TEMPLATES[template].style in seen.values():
        return template
    if "two" in seen.values():
        return "vicuna_v1"
    names = [name for name, layout in TEMPLATES.items() if layout.style in seen.values()]
    layouts = f"; of ours {', '.join(names)} have it" if names else "; none of ours has it"
    raise CheckpointError(
        f"The chat template of {where} has {next(iter(seen))!r}, which is not in the prompt layout {template!r}, "
        f"expected of such a model{layouts}. Name the one that it was trained with, if it is ours, with --template."
    )


def _text(value: Any) -> str:
    """Of several templates with names, all."""
    if isinstance(value, str):
        return value
    parts = [part.get("template") for part in value if isinstance(part, dict)] if isinstance(value, list) else []
    return "\n".join(part for part in parts if isinstance(part, str))
