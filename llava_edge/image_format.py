"""Detect the format of an image file, and describe other files for error messages.

Looks at content only, never at file names, and decodes nothing.
"""

from __future__ import annotations

import zlib

from llava_edge.placeholder import describe_placeholder

ACCEPTED = "JPEG, PNG, WebP, GIF and BMP"
CONVERT_HEIC = "convert it, say by 'heif-convert photo.heic photo.jpg'"

_MAGIC_BYTES = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF87a": "GIF", b"GIF89a": "GIF", b"BM": "BMP"}

BASE64 = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")  # prefixes of base64-encoded JPEG, PNG, GIF and WebP

# (offset, magic bytes, description), only for error messages. The first match counts.
_OTHER_FORMATS = (
    (0, b"\x89PNG", "a PNG picture that a transfer in text mode has damaged"),
    (4, b"ftypavi", "an AVIF picture"),
    (4, b"ftyphe", f"a HEIC picture ({CONVERT_HEIC})"),
    (4, b"ftypmif1", f"a HEIC picture ({CONVERT_HEIC})"),
    (4, b"ftypmsf1", f"a HEIC picture ({CONVERT_HEIC})"),
    (4, b"ftypcrx", "a camera raw picture"),
    (4, b"ftyp", "an MP4 or QuickTime video"),
    (0, b"II*\0", "a TIFF or camera raw picture"),
    (0, b"MM\0*", "a TIFF or camera raw picture"),
    (0, b"II+\0", "a TIFF picture"),
    (0, b"MM\0+", "a TIFF picture"),
    (0, b"%PDF", "a PDF document"),
    (0, b"%!PS", "a PostScript file"),
    (0, b"\xc5\xd0\xd3\xc6", "a PostScript file"),
    (0, b"8BPS", "a Photoshop file"),
    (0, b"gimp xcf", "a GIMP file"),
    (0, b"\0\0\0\x0cjP  ", "a JPEG 2000 picture"),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 picture"),
    (0, b"\xff\x0a", "a JPEG XL picture"),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL picture"),
    (0, b"\0\0\1\0", "an icon file"),
    (0, b"SIMPLE  =", "a FITS picture"),
    (0, b"qoif", "a QOI picture"),
    (0, b"DDS ", "a DDS texture"),
    (0, b"v/1\1", "an OpenEXR picture"),
    (128, b"DICM", "a DICOM picture"),
    (0, b"P5\n", "a PGM picture"),
    (0, b"P6\n", "a PPM picture"),
    (8, b"AVI ", "an AVI video"),
    (0, b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (0, b"\0\0\1\xba", "an MPEG video"),
    (0, b"PK\x03\x04", "a ZIP archive (or an office document)"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"7z\xbc\xaf", "a 7-Zip archive"),
    (0, b"Rar!", "a RAR archive"),
    (0, b"GGUF", "a GGUF model"),
    (0, b"data:", "a data: URL as text"),
    *((0, start.encode(), "base64 text; pass what base64.b64decode returns") for start in BASE64),
)


def detect_format(data: bytes) -> str | None:
    """Pillow's name for the format of `data`, by content; None if it is not one of the five."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return next((kind for magic, kind in _MAGIC_BYTES.items() if data.startswith(magic)), None)


def describe_bytes(data: bytes) -> str:
    """A predicate for error messages: "is a PDF document", "is empty", ..."""
    if not data.strip(b"\0"):
        return f"holds nothing but {len(data)} zero bytes" if data else "is empty"
    for offset, magic, what in _OTHER_FORMATS:
        if data.startswith(magic, offset):
            return f"is {what}"
    text = data[:4096].decode("utf-8-sig", "ignore").lstrip().lower()
    if text.startswith("<") and "<svg" in text:
        return "is an SVG drawing"
    placeholder = describe_placeholder(data)
    return f"is {placeholder}" if placeholder else "is not a picture"


def is_complete(data: bytes, kind: str) -> bool:
    """False if a file is certainly truncated or damaged in a way Pillow would not notice; True proves nothing."""
    if kind == "JPEG":
        return _is_complete_jpeg(data)
    return kind != "PNG" or _is_complete_png(data)


def _is_complete_jpeg(data: bytes) -> bool:
    """Whether the scan has an end marker; without one, Pillow may fill the missing part with grey."""
    position = 2
    # Skip to the start of the scan: thumbnails have end markers. Between segments, decoders skip stray bytes.
    while position + 4 <= len(data) and data[position : position + 2] != b"\xff\xda":
        stray = data[position] != 0xFF or data[position + 1] in (0, 0xFF)
        position += 1 if stray else 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return data.find(b"\xff\xd9", position) >= 0


def _is_complete_png(data: bytes) -> bool:
    """Whether the critical chunks up to IEND match their checksums; Pillow does not check those of the pixels."""
    position, view = 8, memoryview(data)
    while position + 12 <= len(data):
        kind = data[position + 4 : position + 8]
        end = position + 8 + int.from_bytes(data[position : position + 4], "big")
        if kind[:1].isupper() and zlib.crc32(view[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return False
        if kind == b"IEND":
            return True
        position = end + 4
    return False
