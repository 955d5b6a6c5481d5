"""data: URLs -> bytes of images. No other URL is ever fetched and no file opened.

The format is detected from the bytes; the media type is only checked against those that are accepted.
"""

from __future__ import annotations

import base64
import re
import string

from llava_edge.image_format import ACCEPTED, CONVERT_HEIC
from llava_edge.server.problems import Problem, bad_request

FORMATS = ("png", "jpeg", "webp", "gif", "bmp")
_MEDIA_TYPE = re.compile(rf"data:(image/(x-|p)?({'|'.join(FORMATS)}|jpg|\*)|application/octet-stream|)")


def decode(url: object, param: str) -> bytes:
    """Decode `data:image/FORMAT;base64,...`, in either alphabet of RFC 4648, padded or not. Raises `Problem` (400)."""
    if not isinstance(url, str):
        raise bad_request("The URL of an image must be a string.", param)
    head, comma, data = url.partition(",")
    media_type, *parameters = (part.strip().lower() for part in head.split(";"))
    if not comma or parameters[-1:] != ["base64"] or not _MEDIA_TYPE.fullmatch(media_type):
        raise _unsupported(media_type if parameters[-1:] == ["base64"] else "", param)
    try:
        letters = data.encode("ascii").translate(None, string.whitespace.encode("ascii")).rstrip(b"=")
        standard = letters.replace(b"-", b"+").replace(b"_", b"/")
        content = base64.b64decode(standard + b"=" * (-len(standard) % 4), validate=True)
    except ValueError as error:
        raise bad_request("The image is not valid base64.", param) from error
    if not content:
        raise bad_request("The image is empty.", param)
    return content


def _unsupported(media_type: str, param: str) -> Problem:
    image_type = re.fullmatch(r"data:(image/[a-z0-9.+-]{1,40})", media_type)
    if image_type:
        advice = CONVERT_HEIC if "hei" in media_type else "convert it to one of these"
        return bad_request(
            f"An image is declared as {image_type[1]}, but only {ACCEPTED} are supported; {advice}.", param
        )
    names = ", ".join(f"data:image/{name}" for name in FORMATS)
    return bad_request(f"Images are accepted only as base64 data: URLs ({names}); nothing is downloaded.", param)
