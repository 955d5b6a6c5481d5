"""Every kind of picture gives the right pixels, and CLIP gets exactly what LLaVA's own preprocessing gives.

Oracles: formulas written here, Pillow used plainly, and transformers' image processors.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from images import Array, bmp_rgba, encode, exif, picture, png, smooth
from PIL import Image, ImageOps
from processes import in_child

from llava_edge import image as image_module
from llava_edge.bundle import Preprocessing
from llava_edge.image import load_image, preprocess, square_and_resize
from llava_edge.runtimes.pictures import copy_image

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
COLOUR = (122, 116, 104)
BICUBIC = Image.Resampling.BICUBIC
PICTURE = picture()
SMOOTH = smooth()
KEY = PICTURE[1, 2]
GREY = PICTURE[..., 0]
ALPHA = picture(seed=1)[..., 0]
BITS = GREY > 127
WIDE = np.random.default_rng(2).integers(0, 65536, (40, 61, 4))  # 16-bit samples
FRAMES = [Image.fromarray(picture(seed=seed)) for seed in (0, 8, 9)]


def on_white(colour: Array, alpha: Array) -> Array:
    """Colour (H, W, 3) with 8-bit alpha over white, rounded."""
    a = alpha[..., None] / 255
    return np.floor(colour * a + 255 * (1 - a) + 0.5).astype(np.uint8)


def same(left: Any, right: Any) -> bool:
    """Two pictures, as Pillow images or arrays, to the bit."""
    return np.array_equal(np.asarray(left), np.asarray(right))


def rgb(grey: Array) -> Array:
    """Grey (H, W) as (H, W, 3) uint8."""
    return np.repeat(grey[..., None], 3, axis=2).astype(np.uint8)


def keyed(colour: Array, transparent: Array) -> Array:
    """White wherever `transparent` (H, W) says so."""
    return np.where(transparent[..., None], 255, colour).astype(np.uint8)


PALETTE = picture(16, 1, seed=3)[0]  # 16 colours
INDEX = GREY % 16
PALETTE_ALPHA = picture(16, 1, seed=4)[0, :, 0]


def palette_image(**info: Any) -> Image.Image:
    image = Image.fromarray(INDEX)
    image.putpalette(PALETTE.tobytes())
    image.info.update(info)
    return image


def rgba() -> Image.Image:
    return Image.fromarray(np.dstack([PICTURE, ALPHA]))


def grey_alpha() -> Image.Image:
    image = Image.fromarray(GREY)
    image.putalpha(Image.fromarray(ALPHA))
    return image


CMYK = np.dstack([SMOOTH, SMOOTH[..., 0] // 4])  # ink, not light
CMYK_AS_RGB = np.round((255 - CMYK[..., :3].astype(float)) * (255 - CMYK[..., 3:]) / 255)


def ycck() -> bytes:
    """CMYK as Photoshop writes it: C, M, Y as brightness and two colours, which Pillow reads but cannot write."""
    light = np.asarray(Image.fromarray(np.ascontiguousarray(CMYK[..., :3])).convert("YCbCr"))
    planes = 255 - np.dstack([light, 255 - CMYK[..., 3]])  # Pillow turns them around again
    data = bytearray(encode(Image.fromarray(planes, "CMYK"), "JPEG", quality=100, subsampling=0))
    data[data.index(b"Adobe") + 11] = 2  # from "as they are" to YCCK
    return bytes(data)


# name -> (file, the pixels it means, largest difference that the format or its rounding explains)
FILES: dict[str, tuple[bytes, Array, int]] = {
    "png rgb": (encode(PICTURE, "PNG"), PICTURE, 0),
    "png rgba": (encode(rgba(), "PNG"), on_white(PICTURE, ALPHA), 1),
    "png grey": (encode(GREY, "PNG"), rgb(GREY), 0),
    "png grey alpha": (encode(grey_alpha(), "PNG"), on_white(rgb(GREY), ALPHA), 1),
    "png 1 bit": (encode(Image.fromarray(BITS), "PNG"), rgb(BITS * 255), 0),
    "png 1 bit key": (png(BITS[..., None], 1, 0, ((b"tRNS", b"\0\0"),)), rgb(np.full_like(GREY, 255)), 0),
    "png 2 bit grey": (png(GREY[..., None] % 4, 2, 0), rgb(GREY % 4 * 85), 0),
    "png 4 bit grey": (png(GREY[..., None] % 16, 4, 0), rgb(GREY % 16 * 17), 0),
    "png 4 bit grey key": (
        png(GREY[..., None] % 16, 4, 0, ((b"tRNS", b"\0\5"),)),
        keyed(rgb(GREY % 16 * 17), GREY % 16 == 5),
        0,
    ),
    "png 8 bit grey key": (png(GREY[..., None], 8, 0, ((b"tRNS", bytes([0, 77])),)), keyed(rgb(GREY), GREY == 77), 0),
    "png rgb key": (
        png(PICTURE, 8, 2, ((b"tRNS", KEY.astype(">u2").tobytes()),)),
        keyed(PICTURE, (PICTURE == KEY).all(-1)),
        0,
    ),
    "png 16 bit grey": (png(WIDE[..., :1], 16, 0), rgb(np.floor(WIDE[..., 0] / 257 + 0.5)), 0),
    "png 16 bit grey key": (
        png(WIDE[..., :1], 16, 0, ((b"tRNS", int(WIDE[3, 3, 0]).to_bytes(2, "big")),)),
        keyed(rgb(np.floor(WIDE[..., 0] / 257 + 0.5)), WIDE[..., 0] == WIDE[3, 3, 0]),
        0,
    ),
    "png 16 bit rgb": (png(WIDE[..., :3], 16, 2), WIDE[..., :3] / 257, 1),
    "png 16 bit rgb key": (
        png(WIDE[..., :3], 16, 2, ((b"tRNS", WIDE[3, 3, :3].astype(">u2").tobytes()),)),
        keyed(WIDE[..., :3] >> 8, (WIDE[..., :3] == WIDE[3, 3, :3]).all(-1)),
        0,
    ),
    "png 16 bit grey alpha": (png(WIDE[..., :2], 16, 4), on_white(rgb(WIDE[..., 0] >> 8), WIDE[..., 1] >> 8), 1),
    "png 16 bit rgba": (png(WIDE, 16, 6), on_white(WIDE[..., :3] >> 8, WIDE[..., 3] >> 8), 1),
    "png palette": (encode(palette_image(), "PNG"), PALETTE[INDEX], 0),
    "png palette one clear": (encode(palette_image(), "PNG", transparency=7), keyed(PALETTE[INDEX], INDEX == 7), 0),
    "png palette alpha": (
        encode(palette_image(), "PNG", transparency=PALETTE_ALPHA.tobytes()),
        on_white(PALETTE[INDEX], PALETTE_ALPHA[INDEX]),
        1,
    ),
    "png colour profile": (encode(PICTURE, "PNG", icc_profile=b"not a profile"), PICTURE, 0),
    "png animated": (encode(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), PICTURE, 0),
    "png trailing bytes": (encode(PICTURE, "PNG") + b"<html>", PICTURE, 0),
    "gif": (encode(palette_image(), "GIF"), PALETTE[INDEX], 0),
    "gif not interlaced": (encode(palette_image(), "GIF", interlace=0), PALETTE[INDEX], 0),
    "gif one clear": (encode(palette_image(), "GIF", transparency=7), keyed(PALETTE[INDEX], INDEX == 7), 0),
    "gif grey": (encode(GREY, "GIF"), rgb(GREY), 0),
    "gif animated": (
        encode(palette_image(), "GIF", save_all=True, append_images=[frame.convert("P") for frame in FRAMES[1:]]),
        PALETTE[INDEX],
        0,
    ),
    "bmp rgb": (encode(PICTURE, "BMP"), PICTURE, 0),
    "bmp grey": (encode(GREY, "BMP"), rgb(GREY), 0),
    "bmp palette": (encode(palette_image(), "BMP"), PALETTE[INDEX], 0),
    "bmp 1 bit": (encode(Image.fromarray(BITS), "BMP"), rgb(BITS * 255), 0),
    "bmp 32 bit": (encode(Image.fromarray(PICTURE).convert("RGBA"), "BMP"), PICTURE, 0),
    "bmp alpha": (bmp_rgba(np.dstack([PICTURE, ALPHA])), on_white(PICTURE, ALPHA), 1),
    "bmp alpha that was never written": (bmp_rgba(np.dstack([PICTURE, 0 * ALPHA])), PICTURE, 0),
    "webp lossless": (encode(PICTURE, "WEBP", lossless=True), PICTURE, 0),
    "webp lossless alpha": (encode(rgba(), "WEBP", lossless=True, exact=True), on_white(PICTURE, ALPHA), 1),
    "webp lossy": (encode(SMOOTH, "WEBP", quality=100), SMOOTH, 6),
    "webp animated": (encode(FRAMES[0], "WEBP", lossless=True, save_all=True, append_images=FRAMES[1:]), PICTURE, 0),
    "jpeg": (encode(SMOOTH, "JPEG", quality=100, subsampling=0), SMOOTH, 3),
    "jpeg progressive": (encode(SMOOTH, "JPEG", quality=100, subsampling=0, progressive=True), SMOOTH, 3),
    "jpeg grey": (encode(SMOOTH[..., 0], "JPEG", quality=100), rgb(SMOOTH[..., 0]), 3),
    "jpeg cmyk, inverted as Adobe does": (encode(Image.fromarray(CMYK, "CMYK"), "JPEG", quality=100), CMYK_AS_RGB, 4),
    "jpeg ycck": (ycck(), CMYK_AS_RGB, 5),
    "jpeg trailing bytes": (encode(SMOOTH, "JPEG", quality=100, subsampling=0) + bytes(999), SMOOTH, 3),
    "jpeg of several (MPO)": (
        encode(SMOOTH, "MPO", quality=100, subsampling=0, save_all=True, append_images=FRAMES[1:]),
        SMOOTH,
        3,
    ),
}

IN_MEMORY: dict[str, tuple[Any, Array, int]] = {
    "array rgb": (PICTURE, PICTURE, 0),
    "array grey": (GREY, rgb(GREY), 0),
    "array rgba": (np.dstack([PICTURE, ALPHA]), on_white(PICTURE, ALPHA), 1),
    "array view": (PICTURE[::-2, ::3, ::-1], PICTURE[::-2, ::3, ::-1], 0),
    "pillow L": (Image.fromarray(GREY), rgb(GREY), 0),
    "pillow 1": (Image.fromarray(BITS), rgb(BITS * 255), 0),
    "pillow P": (palette_image(), PALETTE[INDEX], 0),
    "pillow PA": (palette_image().convert("PA"), PALETTE[INDEX], 0),
    "pillow LA": (grey_alpha(), on_white(rgb(GREY), ALPHA), 1),
    "pillow La": (grey_alpha().convert("La"), on_white(rgb(GREY), ALPHA), 2),
    "pillow RGBa": (rgba().convert("RGBa"), on_white(PICTURE, ALPHA), 2),
    "pillow RGBX": (Image.fromarray(PICTURE).convert("RGBX"), PICTURE, 0),
    "pillow CMYK": (Image.fromarray(CMYK, "CMYK"), CMYK_AS_RGB, 1),
    "pillow YCbCr": (Image.fromarray(SMOOTH).convert("YCbCr"), SMOOTH, 3),
    "pillow HSV": (Image.fromarray(SMOOTH).convert("HSV"), SMOOTH, 4),
    "pillow I;16": (Image.fromarray(WIDE[..., 0].astype("<u2")), rgb(np.floor(WIDE[..., 0] / 257 + 0.5)), 0),
    "pillow I;16B": (
        Image.frombytes("I;16B", (61, 40), WIDE[..., 0].astype(">u2").tobytes()),
        rgb(np.floor(WIDE[..., 0] / 257 + 0.5)),
        0,
    ),
}


@pytest.mark.parametrize(("source", "expected", "tolerance"), (FILES | IN_MEMORY).values(), ids=FILES | IN_MEMORY)
def test_pixels(source: Any, expected: Array, tolerance: int) -> None:
    image = load_image(source)
    assert (image.mode, image.info) == ("RGB", {})
    assert np.asarray(image).shape == expected.shape
    assert np.abs(np.asarray(image) - expected.astype(float)).max() <= tolerance


UPRIGHT: dict[int, Callable[[Array], Array]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(orientation: int) -> None:
    expected = UPRIGHT[orientation](PICTURE)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        data = encode(PICTURE, kind, exif=exif(orientation), **options)
        assert same(load_image(data), expected), kind
    jpeg = encode(PICTURE, "JPEG", exif=exif(orientation))
    with Image.open(io.BytesIO(jpeg)) as image:
        assert same(load_image(jpeg), ImageOps.exif_transpose(image))
    assert same(load_image(load_image(jpeg)), load_image(jpeg)), "turned twice"


@pytest.mark.parametrize("block", [exif(9), exif(0), b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"MM"])
def test_meaningless_exif_is_no_orientation(block: bytes) -> None:
    assert same(load_image(encode(PICTURE, "PNG", exif=block)), PICTURE)


def test_path_bytes_and_pillow_give_the_same(tmp_path: Path) -> None:
    data = encode(PICTURE, "JPEG", exif=exif(6))
    path = tmp_path / "wrong ending.txt"
    path.write_bytes(data)
    expected = np.asarray(load_image(data))
    assert expected.shape == (61, 40, 3)
    with Image.open(path) as opened:
        for source in (path, str(path), opened):
            assert same(load_image(source), expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "turned", "array", "Pillow"])
def test_no_copy_is_made_of_pixels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A phone's photo takes 47 MB for each, and a third more of the time."""
    turned = {"exif": exif(6)} if kind == "turned" else {}
    pixels = smooth(24, 16)
    given: dict[str, Any] = {"array": pixels, "Pillow": Image.fromarray(pixels)}
    source = given[kind] if kind in given else encode(pixels, "JPEG" if kind == "turned" else kind, **turned)
    expected = load_image(source)
    monkeypatch.setattr(Image.Image, "copy", None)
    monkeypatch.setattr(Image.Image, "convert", None)
    found = load_image(source)
    assert found.tobytes() == expected.tobytes()


def test_several_threads_may_show_a_picture_that_is_not_loaded_yet() -> None:
    """Two that did so at once broke it for both, or showed it as it lies in the file."""
    data = encode(Image.effect_noise((500, 400), 60).convert("RGB"), "JPEG", exif=exif(6))
    wanted = load_image(data)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(30):
            lazy = Image.open(io.BytesIO(data))
            for shown in pool.map(lambda take, lazy=lazy: take(lazy), [load_image, copy_image] * 4):
                assert same(load_image(shown), wanted)


def test_the_callers_picture_is_left_alone() -> None:
    image = palette_image(transparency=7)
    before = image.tobytes(), dict(image.info), image.mode
    result = load_image(image)
    result.paste((1, 2, 3), (0, 0, 9, 9))
    assert (image.tobytes(), image.info, image.mode) == before
    plain = Image.fromarray(PICTURE)
    plain.info["dpi"] = (72, 72)
    assert load_image(plain) is plain
    assert (same(plain, PICTURE), plain.info) == (True, {"dpi": (72, 72)})


# Preprocessing


def spec(size: int, square: Literal["pad", "crop"]) -> Preprocessing:
    return Preprocessing(size, MEAN, STD, square)


def pad_plainly(image: Image.Image) -> Image.Image:
    """LLaVA's expand2square: a canvas of the longer side in the mean colour."""
    width, height = image.size
    side = max(width, height)
    canvas = Image.new("RGB", (side, side), COLOUR)
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas


def crop_plainly(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    short, long = min(width, height), max(width, height)
    new = (size, int(size * long / short)) if width <= height else (int(size * long / short), size)
    left, top = (new[0] - size) // 2, (new[1] - size) // 2
    return image.resize(new, BICUBIC).crop((left, top, left + size, top + size))


def normalise_plainly(image: Image.Image) -> Array:
    """(3, S, S): CLIPImageProcessor's arithmetic, channel by channel."""
    planes = [
        ((np.asarray(plane).astype(np.float64) * 0.00392156862745098).astype(np.float32) - np.float32(mean))
        / np.float32(std)
        for plane, mean, std in zip(image.split(), MEAN, STD, strict=True)
    ]
    return np.stack(planes)


SIZES = [(1, 1), (2, 2), (13, 14), (101, 64), (64, 101), (224, 224), (336, 336), (335, 336), (337, 335), (640, 480)]
SIZES += [(9, 1000), (1000, 9), (1999, 224), (500, 333), (333, 500), (1, 335), (337, 1)]


@pytest.mark.parametrize("size", [14, 336])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_bit_equal_to_plain_pillow(width: int, height: int, size: int) -> None:
    image = Image.fromarray(picture(width, height))
    padded, cropped = pad_plainly(image).resize((size, size), BICUBIC), crop_plainly(image, size)
    for pixels, expected in (
        (preprocess(image, spec(size, "pad")), padded),
        (preprocess(image, spec(size, "crop")), cropped),
    ):
        assert pixels.dtype == np.float32
        assert pixels.shape == (3, size, size)
        assert pixels.flags.c_contiguous
        assert same(pixels, normalise_plainly(expected))


@pytest.mark.parametrize(("width", "height"), [(1, 3000), (3000, 1), (2, 4097)])
def test_strips_are_padded_exactly(width: int, height: int) -> None:
    image = Image.fromarray(picture(width, height))
    expected = pad_plainly(image).resize((336, 336), BICUBIC)
    assert same(square_and_resize(image, 336, MEAN, "pad"), expected)


def test_padding_band_by_band_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(5)
    for _ in range(40):
        width, height, size = (int(n) for n in generator.integers(1, 300, 3))
        monkeypatch.setattr(image_module, "BAND_PIXELS", int(generator.integers(1, 3000)))
        image = Image.fromarray(picture(width, height))
        expected = pad_plainly(image).resize((size, size), BICUBIC)
        assert same(square_and_resize(image, size, MEAN, "pad"), expected), (width, height, size)


@pytest.mark.parametrize("allowed", [0, 1])
def test_padding_without_more_threads(allowed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    left, start = [None] * allowed, threading.Thread.start

    def start_if_allowed(thread: threading.Thread) -> None:
        if not left:
            raise RuntimeError("can't start new thread")
        left.pop()
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_if_allowed)
    image = Image.fromarray(picture(50, 30))
    assert same(square_and_resize(image, 24, MEAN, "pad"), pad_plainly(image).resize((24, 24), BICUBIC))


def test_known_numbers_of_llava() -> None:
    """Offset 18 for 101 x 64, colour (122, 116, 104), 640 x 480 -> 448 x 336 cut at 56 (llava/mm_utils.py)."""
    image = Image.fromarray(picture(101, 64))
    padded = np.asarray(square_and_resize(image, 101, MEAN, "pad"))
    assert same(padded[18:82], image)
    assert (padded[:18] == COLOUR).all()
    assert (padded[82:] == COLOUR).all()
    photo = Image.fromarray(picture(640, 480))
    cut = photo.resize((448, 336), BICUBIC).crop((56, 0, 392, 336))
    assert same(square_and_resize(photo, 336, MEAN, "crop"), cut)
    edge = preprocess(Image.new("RGB", (101, 64)), spec(101, "pad"))[:, 0, 0]
    assert edge == pytest.approx([-0.011254, -0.011196, -0.001333], abs=2e-6)


@pytest.fixture(scope="module")
def processors() -> Any:
    """transformers, which warns of its own affairs when imported."""
    import warnings

    pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import hugging_face

        return hugging_face.pillow("clip"), hugging_face.pillow("llava")


@pytest.mark.parametrize(("width", "height"), [(1, 1), (101, 64), (64, 101), (640, 480), (333, 500), (337, 336)])
def test_bit_equal_to_transformers(processors: Any, width: int, height: int) -> None:
    clip, llava = processors
    options = {"image_mean": MEAN, "image_std": STD, "size": {"shortest_edge": 224}}
    options["crop_size"] = {"height": 224, "width": 224}
    image = Image.fromarray(picture(width, height))
    call = {"images": image, "return_tensors": "np", "input_data_format": "channels_last"}
    cropped = clip(**options)(**call)["pixel_values"][0]
    assert same(preprocess(image, spec(224, "crop")), cropped)
    padded = llava(do_pad=True, **options)(**call)["pixel_values"][0]
    assert same(preprocess(image, spec(224, "pad")), padded)


def test_import_brings_no_engine() -> None:
    code = "import sys, llava_edge.image; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = in_child(code).stdout.split()
    assert "PIL" in loaded
    assert not {"torch", "onnxruntime", "onnx", "llama_cpp", "gguf", "transformers", "tokenizers"} & set(loaded)


def test_only_the_five_parsers_are_loaded() -> None:
    code = """
import sys
from llava_edge.errors import ImageError
from llava_edge.image import load_image
for line in sys.stdin:
    try:
        load_image(bytes.fromhex(line))
    except ImageError:
        print("refused")
print(*sys.modules)
"""
    files = [FILES[name][0] for name in ("png rgb", "gif", "bmp rgb", "webp lossless", "jpeg")]
    lines = [data.hex() for data in (*files, b"GIF89a" + bytes(30), b"%!PS-Adobe-3.0 EPSF-3.0", b"8BPS")]
    said = in_child(code, given="\n".join(lines)).stdout
    loaded = set(said.split())
    assert said.count("refused") == 3
    assert "PIL.WebPImagePlugin" in loaded
    assert not {f"PIL.{name}ImagePlugin" for name in ("Eps", "Psd", "Fits", "Pdf", "Jpeg2K", "Avif", "Ico")} & loaded


@pytest.mark.slow
def test_fifty_megapixels() -> None:
    values = np.random.default_rng(6).integers(0, 256, (80, 102), dtype=np.uint8)
    big = Image.fromarray(values).resize((8160, 6400), Image.Resampling.NEAREST)
    image = load_image(encode(big, "PNG", compress_level=1))
    assert image.size == (8160, 6400)
    expected = pad_plainly(big.convert("RGB")).resize((224, 224), BICUBIC)
    assert same(square_and_resize(image, 224, MEAN, "pad"), expected)
