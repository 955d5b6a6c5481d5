"""`smol`'s pictures from packages of the real layout, a few pictures each: what is held out, and that it stays out."""

from __future__ import annotations

import io
import json
import shutil
import sys
import tarfile
import zipfile
from collections import defaultdict
from pathlib import Path

import pytest
from images import encode, picture

from llava_edge import interpreter
from llava_edge.errors import CannotCreateError, DataError, MissingError, UnavailableError, UsageError
from llava_edge.models import sources
from llava_edge.models.conversations import write_records
from llava_edge.models.evaluate import question_sets
from llava_edge.models.sources import EMOJI_STYLES, HELD_OUT_STYLE, Item, collect

PNG = encode(picture(8, 8), "PNG")
NAMES = ["grinning face", "red apple", "blue book", "house", "fast car", "umbrella"]
CAPTIONS = [f"Animal number {n}." for n in range(200)]
ROUNDS = dict.fromkeys(("grocery", "clothing", "objects", "emoji", "easy-vqa", "tuxpaint"), 1.0)


def tgz(path: Path, files: dict[str, object]) -> None:
    """What `npm pack` writes."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            data = json.dumps(content).encode()
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def easy_vqa(package: str, folder: Path) -> Path:
    """What pip downloads."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "easy_vqa-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for split in ("train", "test"):
            asked = [[f"what shape is in {split}?", "circle", n] for n in range(3)]
            wheel.writestr(f"easy_vqa/data/{split}/questions.json", json.dumps(asked))
            for n in range(3):
                wheel.writestr(f"easy_vqa/data/{split}/images/{n}.png", PNG)
    return path


def fetched(command: list[str], folder: Path) -> None:
    """npm, apt-get and dpkg-deb, without a network."""
    folder.mkdir(parents=True, exist_ok=True)
    if command[-1] == sources.EMOJIBASE:
        rows = [{"group": 0, "label": name, "hexcode": f"1F60{n}"} for n, name in enumerate(NAMES)]
        tgz(
            folder / "emojibase-data-17.0.0.tgz",
            {"meta/groups.json": {"groups": {"0": "smileys-emotion"}}, "en/data.json": rows},
        )
    elif command[0] == "npm":
        style, version = command[-1].removeprefix("@iconify-json/").split("@")
        icons = {name.replace(" ", "-"): {"body": '<rect width="9" height="9"/>'} for name in NAMES}
        tgz(folder / f"iconify-json-{style}-{version}.tgz", {"icons.json": {"icons": icons}, "chars.json": {}})
    elif command[0] == "apt-get":
        (folder / "stamps.deb").touch()
    else:
        stamps = folder / "usr/share/tuxpaint/stamps"
        stamps.mkdir(parents=True)
        for n, caption in enumerate([*CAPTIONS, *CAPTIONS[:50]]):  # some captions have two pictures
            (stamps / f"{n}.txt").write_text(f"{caption}\n", "utf-8")
            (stamps / f"{n}.png").write_bytes(PNG)


@pytest.fixture(autouse=True)
def programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """All are there, though none is started."""
    monkeypatch.setattr(shutil, "which", lambda name: name)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of photos as the trainer expects it."""
    folder = tmp_path / "photos"
    folder.mkdir()
    lines = []
    for source in ("GroceryStoreDataset", "clothing-dataset-small", "imagenet-sample-images"):
        for split in ("train", "val"):
            for n in range(5):
                name = f"{source}-{split}-{n}.jpg"
                (folder / name).write_bytes(encode(picture(40, 30, n), "JPEG"))
                row = {"image": name, "source": source, "split": split, "label": f"thing {n}", "category": "things"}
                lines.append(json.dumps(row))
    (folder / "labels.jsonl").write_text("\n".join(lines), "utf-8")
    (folder / "grocery_descriptions.json").write_text(json.dumps({"thing 0": "A tasty thing."}), "utf-8")
    return folder


@pytest.fixture
def items(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> list[Item]:
    pytest.importorskip("resvg_py", reason="resvg-py, which draws the emoji, is not installed")
    monkeypatch.setattr(sources, "_run", fetched)
    monkeypatch.setattr(interpreter, "download_wheel", easy_vqa)
    return collect(tmp_path / "data", photos)


def test_each_source_holds_out_what_the_model_card_says(items: list[Item]) -> None:
    held_out, trained = (
        [item for item in items if item.split == split and (item.source != "tuxpaint")] for split in ("val", "train")
    )
    for item in held_out:
        assert "-val-" in item.image or "/test/" in item.image or f"emoji/{HELD_OUT_STYLE}/" in item.image
    for item in trained:
        assert "-train-" in item.image or "/train/" in item.image or item.text in set(EMOJI_STYLES) - {HELD_OUT_STYLE}
    assert {item.source for item in held_out} == set(ROUNDS) - {"tuxpaint"}
    assert {item.source for item in trained} == set(ROUNDS) - {"tuxpaint"}


NO_LABEL = {"image": "a.jpg", "source": "GroceryStoreDataset", "split": "train", "label": "", "category": "things"}


@pytest.mark.parametrize(
    "line",
    ["", "label", "[]", '{"image": "a.jpg"}', '{"image": "a", "source": [], "split": "val", "label": "x"}',
     json.dumps(NO_LABEL)],
)  # fmt: skip
def test_a_line_about_photos_that_cannot_be_used_is_named(photos: Path, tmp_path: Path, line: str) -> None:
    labels = photos / "labels.jsonl"
    labels.write_text("\n".join([labels.read_text("utf-8"), line, "{}"]), "utf-8")
    with pytest.raises(DataError, match=r"labels\.jsonl, line 31: expected an object with image, label"):
        collect(tmp_path / "data", photos)


def test_texts_of_groceries_that_are_missing_or_none_are_said(photos: Path, tmp_path: Path) -> None:
    texts = photos / "grocery_descriptions.json"
    texts.write_text('["A tasty thing."]', "utf-8")
    with pytest.raises(DataError, match="maps grocery labels to descriptions"):
        collect(tmp_path / "data", photos)
    texts.unlink()
    with pytest.raises(MissingError, match="maps grocery labels to descriptions"):
        collect(tmp_path / "data", photos)


def test_what_fetches_and_draws_pictures_is_looked_for_first(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fetcher in ((sources, "_run"), (interpreter, "download_wheel")):
        monkeypatch.setattr(*fetcher, lambda what, folder: pytest.fail(f"{what} was fetched"))
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "dpkg-deb" else name)
    with pytest.raises(UnavailableError, match="dpkg-deb is needed to fetch training pictures"):
        collect(tmp_path / "data", photos)
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ModuleNotFoundError, match="resvg_py"):
        collect(tmp_path / "data", photos)


@pytest.mark.parametrize("name", sources.RECORDS)
def test_record_files_of_others_are_not_overwritten(photos: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(CannotCreateError, match=f"{name} is not of this recipe"):
        collect(tmp_path, photos)
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("line", ['{"image"', "[]", '{"image": "a.png"}', '{"image": "a", "source": "b", "split": 1}'])
def test_a_damaged_list_of_what_was_collected_is_said(photos: Path, tmp_path: Path, line: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "items.jsonl").write_text(line, "utf-8")
    with pytest.raises(DataError, match=r"items\.jsonl is damaged: .*Remove it"):
        collect(tmp_path / "data", photos)


def test_a_caption_of_tuxpaint_is_on_one_side_with_all_its_pictures(items: list[Item]) -> None:
    sides = defaultdict(set)
    for item in items:
        if item.source == "tuxpaint":
            sides[item.text].add(item.split)
    assert set(sides) == set(CAPTIONS)
    assert all(len(splits) == 1 for splits in sides.values())
    assert 0.08 < sum(splits == {"val"} for splits in sides.values()) / len(sides) < 0.22


def test_no_record_shows_or_says_what_is_held_out(items: list[Item], tmp_path: Path, photos: Path) -> None:
    """The very files the trainer reads, against the questions that accuracy is measured with."""
    data = tmp_path / "data"
    write_records(data, photos, seed=0, rounds=ROUNDS, per_picture=4, multi_turn=0.15)
    records = [
        record for name in ("captions", "questions") for record in json.loads((data / f"{name}.json").read_text())
    ]
    shown = {record["image"] for record in records if "image" in record}
    trained = {item.image for item in items if item.split == "train"}
    asked = {question.image for questions in question_sets(items).values() for question in questions}
    assert asked
    assert shown == trained
    assert not shown & asked
    assert all((data / image).is_file() for image in shown | asked)
    said = json.dumps(records)
    assert not [item.text for item in items if item.source == "tuxpaint" and item.split == "val" and item.text in said]


def test_other_photos_than_those_of_the_data_are_refused(items: list[Item], tmp_path: Path, photos: Path) -> None:
    """Their accuracy would be that of the photos from before."""
    others = tmp_path / "others"
    with pytest.raises(MissingError, match=r"others/labels\.jsonl does not exist"):
        collect(tmp_path / "data", others)
    shutil.copytree(photos, others)
    with pytest.raises(UsageError, match=rf"was made with the photos in {photos}; pass these, or pass another --data"):
        collect(tmp_path / "data", others)
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "photos").symlink_to(tmp_path / "gone")
    with pytest.raises(
        UsageError, match=r"photos in .*/gone; they are no longer there: put them back, or pass another"
    ):
        collect(moved, others)
    assert collect(tmp_path / "elsewhere", others) == items


def test_a_second_call_fetches_nothing(
    items: list[Item], tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fetcher in ((sources, "_run"), (interpreter, "download_wheel")):
        monkeypatch.setattr(*fetcher, lambda what, folder: pytest.fail(f"{what} was fetched"))
    assert collect(tmp_path / "data", photos) == items
