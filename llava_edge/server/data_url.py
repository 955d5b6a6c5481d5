"""data: URLs -> bytes. The only way a picture comes in: no other address is ever followed, and no file opened.

What a picture is, its bytes tell; the type and parameters of the URL are not taken for more than a label.
"""

from __future__ import annotations

import base64
import binascii
import re

from llava_edge.image_format import ACCEPTED, CONVERT_HEIC
from llava_edge.server.problems import Problem, bad

KINDS = ("png", "jpeg", "webp", "gif", "bmp")
_LABEL = re.compile(rf"data:(image/(x-|p)?({'|'.join(KINDS)}|jpg|\*)|application/octet-stream|)")


def decode(url: object, param: str) -> bytes:
    """Bytes of `data:image/KIND;base64,...`, however base64 is written (RFC 4648). Raises `Problem` (400)."""
    if not isinstance(url, str):
        raise bad("The address of an image must be a text.", param)
    head, comma, data = url.partition(",")
    kind, *parameters = (part.strip().lower() for part in head.split(";"))
    if not comma or parameters[-1:] != ["base64"] or not _LABEL.fullmatch(kind):
        raise _refused(kind if parameters[-1:] == ["base64"] else "", param)
    try:
        plain = "".join(data.split()).rstrip("=").replace("-", "+").replace("_", "/")
        content = base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad("The image is not valid base64.", param) from error
    if not content:
        raise bad("The image is empty.", param)
    return content


def _refused(label: str, param: str) -> Problem:
    other = re.fullmatch(r"data:(image/[a-z0-9.+-]{1,40})", label)
    if other:
        how = CONVERT_HEIC if "hei" in label else "convert it to one of these"
        return bad(f"An image is {other[1]} by its label, but {ACCEPTED} are read; {how}.", param)
    names = ", ".join(f"data:image/{kind}" for kind in KINDS)
    return bad(f"Images are accepted only as base64 data: URLs ({names}); nothing is downloaded.", param)
