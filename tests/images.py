"""Pictures made in memory for the tests: known pixels, encoded every way people meet them."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

Array = np.ndarray[Any, Any]

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"  # the beginning of a file


def picture(width: int = 61, height: int = 40, seed: int = 0) -> Array:
    """uint8 (height, width, 3): noise, so that every wrong pixel, row or channel shows."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(width: int = 64, height: int = 48) -> Array:
    """uint8 (height, width, 3): slow gradients, which JPEG keeps within a few steps."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 200 // width + 20, y * 200 // height + 20, (x + y) * 180 // (width + height) + 40], -1).astype(
        np.uint8
    )


def encode(image: Image.Image | Array, kind: str, **options: Any) -> bytes:
    """The bytes Pillow writes for this format."""
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def png(samples: Array, bits: int, colour_type: int, chunks: tuple[tuple[bytes, bytes], ...] = ()) -> bytes:
    """A PNG written by the book, for what Pillow cannot write: `samples` (height, width, channels) of 1 to 16 bits."""
    height, width = samples.shape[:2]
    flat = samples.reshape(height, -1)
    if bits == 16:
        rows = [row.astype(">u2").tobytes() for row in flat]
    else:
        steps = np.arange(bits - 1, -1, -1)
        rows = [np.packbits((row[:, None] >> steps & 1).astype(np.uint8).ravel()).tobytes() for row in flat]
    return png_file(width, height, bits, colour_type, b"".join(b"\0" + row for row in rows), chunks)


def png_file(
    width: int,
    height: int,
    bits: int = 8,
    colour_type: int = 2,
    raw: bytes = b"",
    chunks: tuple[tuple[bytes, bytes], ...] = (),
) -> bytes:
    """A PNG whose header may promise other pixels than `raw` (filter bytes included) holds."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    body = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in body)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def webp_canvas(width: int, height: int) -> bytes:
    """A WebP whose extended header promises a canvas of this size around a small picture."""
    inner = encode(picture(8, 8), "WEBP", lossless=True)[12:]
    sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + sizes + inner
    return b"RIFF" + struct.pack("<I", len(body)) + body


def bmp_header(width: int, height: int) -> bytes:
    """A 24-bit BMP that promises this size and has no pixels."""
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *[0] * 6)


def bmp_rgba(pixels: Array) -> bytes:
    """A BMP of the fifth version with an alpha mask, from uint8 (height, width, 4) RGBA."""
    height, width = pixels.shape[:2]
    sizes = struct.pack("<IiiHHIIiiII", 124, width, -height, 1, 32, 3, pixels.size, 0, 0, 0, 0)
    masks = struct.pack("<4I4s", 0xFF0000, 0xFF00, 0xFF, 0xFF000000, b"BGRs")
    header = (sizes + masks).ljust(124, b"\0")
    start = 14 + len(header)
    return b"BM" + struct.pack("<IHHI", start + pixels.size, 0, 0, start) + header + pixels[..., [2, 1, 0, 3]].tobytes()


def jpeg_sized(width: int, height: int) -> bytes:
    """A JPEG whose frame header promises this size and whose scan is far too short."""
    data = bytearray(encode(smooth(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def exif(orientation: int) -> bytes:
    """EXIF with nothing but an orientation."""
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()
