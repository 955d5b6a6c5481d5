"""data: URLs -> bytes. The only way a picture comes in: no other address is ever followed, and no file opened."""

from __future__ import annotations

import base64
import binascii

from llava_edge.server.problems import bad

KINDS = ("png", "jpeg", "webp", "gif", "bmp")


def decode(url: object, param: str) -> bytes:
    """Bytes of `data:image/KIND;base64,...`. Raises `Problem` (400)."""
    if not isinstance(url, str):
        raise bad("The address of an image must be a text.", param)
    head, comma, data = url.partition(",")
    if not comma or head.lower() not in {f"data:image/{kind};base64" for kind in (*KINDS, "jpg")}:
        names = ", ".join(f"data:image/{kind}" for kind in KINDS)
        raise bad(f"Images are accepted only as base64 data: URLs ({names}); nothing is downloaded.", param)
    try:
        content = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad("The image is not valid base64.", param) from error
    if not content:
        raise bad("The image is empty.", param)
    return content
