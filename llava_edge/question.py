"""What a caller of the library may pass as a question and its images."""

from __future__ import annotations

from collections.abc import Sequence

from llava_edge.errors import UsageError
from llava_edge.image import ImageInput
from llava_edge.options import DEFAULT_PROMPT
from llava_edge.prompt import Message
from llava_edge.runtimes.pictures import Picture

AnyImage = ImageInput | bytearray | memoryview | Picture
Images = AnyImage | Sequence[AnyImage] | None

SINGLE = (str, bytes, bytearray, memoryview)  # sequences, but one image each


def system_messages(system: str) -> list[Message]:
    return [Message("system", system)] if system else []


def question_messages(system: str, prompt: str, images: Sequence[object]) -> list[Message]:
    """A conversation of one question with slots for `images`; an empty `system` means the model's own."""
    return [*system_messages(system), Message("user", prompt, len(images))]


def check_question(text: str, images: Sequence[object]) -> None:
    """Raise `UsageError` if `text` is not a string, or asks for a description without an image."""
    if not isinstance(text, str):
        raise UsageError(f"A question is a text, not {text!r:.60}.")
    if text == DEFAULT_PROMPT and not images:
        raise UsageError("There is no image to describe; pass one, or a question.")


def as_list(images: Images) -> list[ImageInput | Picture]:
    """The images that a caller gave as one, several or None; buffers are copied."""
    if images is None:
        return []
    if isinstance(images, Sequence) and not isinstance(images, SINGLE):
        return [copy_buffer(image) for image in images]
    return [copy_buffer(images)]


def copy_buffer(image: AnyImage) -> ImageInput | Picture:
    """Copy the contents of a buffer, which its owner may change."""
    return bytes(image) if isinstance(image, bytearray | memoryview) else image
