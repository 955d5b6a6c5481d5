"""The training pictures of `smol`: collects each source's pictures and what is known about them as `Item`s.

    photos     a folder with labels.jsonl: grocery, clothing and object photographs (origin: model card)
    easy-vqa   PyPI easy-vqa: 64 px drawings of one coloured shape, with questions and answers (MIT)
    emoji      npm @iconify-json/{noto,fluent-emoji,fluent-emoji-flat,twemoji}; names and groups from npm emojibase-data
    tuxpaint   Debian tuxpaint-stamps-default: clip art with one sentence each

Packages are fetched by pip, npm and apt and only unpacked; nothing in them is run. `twemoji`, easy-VQA's test split,
the photos' `val` split and 15 % of the Tux Paint captions get split "val" and are never trained on.
Knows nothing about questions; see `conversations.py`.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

from PIL import Image, ImageEnhance

from llava_edge import interpreter
from llava_edge.errors import CannotCreateError, DataError, MissingError, UnavailableError, UsageError
from llava_edge.outputs import replacing
from llava_edge.typed import build

EASY_VQA = "easy-vqa==1.0"
EMOJI_STYLES = {"noto": "1.2.9", "fluent-emoji": "1.2.7", "fluent-emoji-flat": "1.2.6", "twemoji": "1.2.5"}
HELD_OUT_STYLE = "twemoji"
EMOJIBASE = "emojibase-data@17.0.0"
TUXPAINT = "tuxpaint-stamps-default"
RENDER_SIZE = 224  # px, of vector pictures
PHOTO_SOURCES = {
    "GroceryStoreDataset": "grocery",
    "clothing-dataset-small": "clothing",
    "imagenet-sample-images": "objects",
}
_LISTING = "items.jsonl"  # written last of what is collected
RECORDS = ("captions.json", "questions.json")  # stage 1 and 2, written after it
AUGMENTED_COPIES = {"grocery": 2}  # per training photo; some products have only 15 photos


@dataclass(frozen=True)
class Item:
    """One picture. `image` is relative to the data folder; `qa` holds the source's own questions and answers."""

    image: str
    source: str
    split: str  # "train" or "val"
    label: str = ""
    category: str = ""
    text: str = ""
    qa: tuple[tuple[str, str], ...] = ()


def collect(folder: Path, photos: Path) -> list[Item]:
    """Fetch, unpack and render everything into `folder`; return all items. A second call reads items.jsonl.

    Raises what `require_sources` raises, `UnavailableError` or `DataError`.
    """
    require_sources(photos, folder)
    listing = folder / _LISTING
    if not listing.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        items = [
            *_collect_photos(folder, photos),
            *_collect_easy_vqa(folder),
            *_collect_emoji(folder),
            *_collect_tuxpaint(folder),
        ]
        with replacing(listing) as temporary:
            temporary.write_text("".join(json.dumps(asdict(item)) + "\n" for item in items), "utf-8")
    try:
        return [build(Item, json.loads(line)) for line in listing.read_text("utf-8").splitlines()]
    except ValueError as error:
        raise DataError(f"{listing} is damaged: {error}. Remove it, and it is created again.") from error


def _run(command: list[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UnavailableError(f"'{' '.join(command)}' failed: {reason}")


def require_sources(photos: Path, folder: Path) -> None:
    """Check that `collect` has what it needs, before anything is fetched.

    Raises `MissingError` if `photos` has no labels.jsonl, `UsageError` if `folder` was made with other photos, and, if
    it is not complete yet, `CannotCreateError` for a record file of others, `UnavailableError` or `ModuleNotFoundError`
    for a missing program or package.
    """
    labels = photos / "labels.jsonl"
    if not labels.is_file():
        raise MissingError(f"{labels} does not exist; pass the folder of training photos with --photos.")
    link = folder / "photos"
    if link.is_symlink() and link.resolve() != photos.resolve():
        original = link.resolve()
        fix = "pass these" if original.exists() else "they are no longer there: put them back"
        raise UsageError(f"{folder} was made with the photos in {original}; {fix}, or pass another --data.")
    if (folder / _LISTING).is_file():
        return
    written = next((folder / name for name in RECORDS if (folder / name).exists()), None)
    if written:
        raise CannotCreateError(
            f"{written} is not of this recipe and would be overwritten; name a new folder with --data."
        )
    import_module("resvg_py")
    for program in ("npm", "apt-get", "dpkg-deb"):
        if not shutil.which(program):
            raise UnavailableError(f"{program} is needed to fetch training pictures and was not found.")


def _read_labels(path: Path) -> list[dict[str, str]]:
    """Read labels.jsonl, one object per photo. Raises `DataError` that names the first bad line."""
    rows = []
    for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
        try:
            row = json.loads(line)
            valid = row["source"] in PHOTO_SOURCES and row["split"] in ("train", "val")
            valid = valid and all(isinstance(row[name], str) for name in ("image", "label", "category"))
            valid = valid and bool(row["label"])
        except (ValueError, KeyError, TypeError, RecursionError):
            valid = False
        if not valid:
            raise DataError(
                f"{path}, line {number}: expected an object with image, label (not empty), category, split (train or "
                f"val) and source ({', '.join(PHOTO_SOURCES)})."
            )
        rows.append(row)
    return rows


def _read_descriptions(path: Path) -> dict[str, str]:
    """Read the descriptions of groceries, by label. Raises `MissingError` or `DataError`."""
    try:
        descriptions = json.loads(path.read_text("utf-8", "replace"))
    except FileNotFoundError as error:
        raise MissingError(
            f"{path} does not exist; expected a JSON object that maps grocery labels to descriptions."
        ) from error
    except (ValueError, RecursionError):
        descriptions = None
    if not isinstance(descriptions, dict) or not all(isinstance(text, str) for text in descriptions.values()):
        raise DataError(f"{path} must be a JSON object that maps grocery labels to descriptions.")
    return descriptions


def _collect_photos(folder: Path, photos: Path) -> Iterator[Item]:
    rows, descriptions = _read_labels(photos / "labels.jsonl"), _read_descriptions(photos / "grocery_descriptions.json")
    link = folder / "photos"
    if not link.exists():
        link.symlink_to(photos.resolve())
    for row in rows:
        kind, name = PHOTO_SOURCES[row["source"]], f"photos/{row['image']}"
        text = descriptions.get(row["label"], "") if kind == "grocery" else ""
        yield Item(name, kind, row["split"], row["label"], row["category"], text)
        if row["split"] == "train":
            for view in _augmented_copies(folder, name, AUGMENTED_COPIES.get(kind, 0)):
                yield Item(view, kind, "train", row["label"], row["category"], text)


def _augmented_copies(folder: Path, name: str, count: int) -> Iterator[str]:
    """Write `count` randomly cropped, rotated and colour-jittered copies of a photo.

    Not mirrored, because packages carry text. The random numbers are seeded with the photo's name.
    """
    for number in range(count):
        rng = random.Random(f"{name} {number}")
        target = folder / "views" / f"{Path(name).with_suffix('')}-{number}.jpg"
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(folder / name) as photo:
                _augment(photo.convert("RGB"), rng).save(target, quality=88)
        yield str(target.relative_to(folder))


def _augment(photo: Image.Image, rng: random.Random) -> Image.Image:
    rotated = photo.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, fillcolor=(122, 116, 104))
    width, height = (round(side * rng.uniform(0.7, 0.95)) for side in rotated.size)
    left, top = rng.randint(0, rotated.width - width), rng.randint(0, rotated.height - height)
    image = rotated.crop((left, top, left + width, top + height))
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhancer(image).enhance(rng.uniform(0.7, 1.3))
    return image


def _collect_easy_vqa(folder: Path) -> Iterator[Item]:
    root = folder / "easy-vqa"
    with zipfile.ZipFile(interpreter.download_wheel(EASY_VQA, root)) as archive:
        archive.extractall(root)
    for split, name, count in (("train", "train", 4000), ("val", "test", 1000)):
        data = root / "easy_vqa" / "data" / name
        questions: dict[int, list[tuple[str, str]]] = {}
        for question, answer, picture in json.loads((data / "questions.json").read_text("utf-8")):
            questions.setdefault(picture, []).append((question, answer))
        for picture in sorted(questions)[:count]:
            path = (data / "images" / f"{picture}.png").relative_to(folder)
            yield Item(str(path), "easy-vqa", split, qa=tuple(questions[picture]))


def _collect_emoji(folder: Path) -> Iterator[Item]:
    root = folder / "emoji"
    _run(["npm", "pack", "--silent", EMOJIBASE], root)
    _untar(next(root.glob("emojibase-data-*.tgz")), root / "emojibase")
    base = root / "emojibase" / "package"
    groups: dict[str, str] = json.loads((base / "meta" / "groups.json").read_text("utf-8"))["groups"]
    rows = [
        row
        for row in json.loads((base / "en" / "data.json").read_text("utf-8"))
        if groups.get(str(row.get("group"))) not in (None, "component")
    ]
    # People and flags have hundreds of near duplicates; a third of each is enough.
    subsampled = {"people-body", "flags"}
    rows = [row for i, row in enumerate(rows) if groups[str(row["group"])] not in subsampled or i % 3 == 0]
    for style, version in EMOJI_STYLES.items():
        _run(["npm", "pack", "--silent", f"@iconify-json/{style}@{version}"], root)
        _untar(root / f"iconify-json-{style}-{version}.tgz", root / style)
        split = "val" if style == HELD_OUT_STYLE else "train"
        # Every fifth of the held-out style is enough to evaluate on.
        for row in rows[:: 5 if style == HELD_OUT_STYLE else 1]:
            path = _render_emoji(root / style, row)
            if path:
                group = groups[str(row["group"])].replace("-", " and ")
                yield Item(str(path.relative_to(folder)), "emoji", split, row["label"], group, style)


def _untar(path: Path, target: Path) -> None:
    with tarfile.open(path) as archive:
        archive.extractall(target, filter="data")


def _render_emoji(style: Path, row: dict[str, str]) -> Path | None:
    """Render one icon of an unpacked iconify set as PNG on white; None if the set lacks it."""
    icons, chars = _icon_set(style)
    slug = re.sub(r"[^a-z0-9]+", "-", row["label"].lower()).strip("-")
    name = chars.get(row["hexcode"].lower(), slug)
    icon = icons["icons"].get(name)
    if icon is None:
        return None
    width, height = (icon.get(k, icons.get(k, 16)) for k in ("width", "height"))
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    target = style / "png" / f"{name}.png"
    target.parent.mkdir(exist_ok=True)
    if not target.is_file():
        _render_svg(svg, target)
    return target


@cache
def _icon_set(style: Path) -> tuple[dict[str, dict[str, dict[str, str]]], dict[str, str]]:
    icons, chars = (json.loads((style / "package" / name).read_text("utf-8")) for name in ("icons.json", "chars.json"))
    return icons, chars


def _render_svg(svg: str, target: Path) -> None:
    from io import BytesIO

    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=RENDER_SIZE, height=RENDER_SIZE))
    _save_on_white(Image.open(BytesIO(png)), target)


def _save_on_white(image: Image.Image, target: Path) -> None:
    """Composite an image on white and save it."""
    rgba = image.convert("RGBA")
    rgba.thumbnail((2 * RENDER_SIZE, 2 * RENDER_SIZE))
    white = Image.new("RGBA", rgba.size, "white")
    white.alpha_composite(rgba)
    white.convert("RGB").save(target)


def _collect_tuxpaint(folder: Path) -> Iterator[Item]:
    root = folder / "tuxpaint"
    _run(["apt-get", "download", "--quiet", TUXPAINT], root)
    _run(["dpkg-deb", "-x", next(root.glob("*.deb")).name, "."], root)
    out = root / "png"
    out.mkdir(exist_ok=True)
    for caption_file in sorted((root / "usr/share/tuxpaint/stamps").rglob("*.txt")):
        lines = caption_file.read_text("utf-8", errors="replace").splitlines()
        picture = caption_file.with_suffix(".png")
        caption = lines[0].strip() if lines else ""
        if not picture.is_file() or not caption or "=" in caption:
            continue
        target = out / f"{hashlib.sha256(str(caption_file.relative_to(root)).encode()).hexdigest()[:16]}.png"
        _save_on_white(Image.open(picture), target)
        # Captions, not pictures, are held out: pictures with the same caption get the same split.
        held_out = int(hashlib.sha256(caption.encode()).hexdigest(), 16) % 100 < 15
        yield Item(str(target.relative_to(folder)), "tuxpaint", "val" if held_out else "train", text=caption)
