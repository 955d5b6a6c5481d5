"""The bundle folder: what is written can be read, and nothing damaged, mixed or hostile is ever accepted.

The parts are arbitrary bytes here: `llava_edge.bundle` never looks into them.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llava_edge import bundle as b
from llava_edge.errors import BundleError, MissingError

Change = Callable[[dict[str, Any]], object]


def make_bundle(folder: Path, seed: int = 0, sizes: tuple[int, ...] = (30, 90, 50, 120, 40)) -> b.Manifest:
    """A bundle of random bytes, one size for each of `b.PARTS`."""
    folder.mkdir()
    noise = random.Random(seed)
    for name, size in zip(b.PARTS, sizes, strict=True):
        (folder / name).write_bytes(noise.randbytes(size))
    manifest = b.Manifest(
        format_version=b.FORMAT_VERSION,
        name=f"toy-{seed}",
        family="llava",
        created_by="tests",
        template="vicuna_v1",
        preprocessing=b.Preprocessing(336, (0.48145466, 0.4578275, 0.40821073), (0.27, 0.26, 0.28), "pad"),
        vision=b.VisionPart(-2, "patch", 1, 576, 1024, "int8"),
        projector=b.ProjectorPart("mlp2x_gelu", "f16"),
        language=b.LanguagePart(4096, 4096, 32000, "q4_k_m"),
        files={name: b.file_entry(folder / name) for name in b.PARTS},
        parity=[b.ParityRow("clip", "relative", 1e-5, 1e-4, 3e-4, 1e-5, True)],
        provenance=[b.Provenance("vision", "openai/clip-vit-large-patch14-336", "MIT")],
    )
    b.write_manifest(folder, manifest)
    return manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_bundle(tmp_path / "toy")
    return tmp_path / "toy"


def edit(folder: Path, change: Change) -> None:
    """Change the manifest's JSON as somebody would who also knows how to sign it again."""
    raw = json.loads((folder / b.MANIFEST).read_text("utf-8"))
    del raw["checksum"]
    change(raw)
    raw["checksum"] = b._checksum(raw)
    (folder / b.MANIFEST).write_text(json.dumps(raw), "utf-8")


def test_round_trip(folder: Path) -> None:
    written = b.read_manifest(folder)
    b.write_manifest(folder, written)
    opened = b.Bundle.open(folder)
    assert opened.manifest == written
    assert written.preprocessing.mean == (0.48145466, 0.4578275, 0.40821073)
    assert opened.part(b.LANGUAGE).read_bytes() == (folder / "language.gguf").read_bytes()


def test_verify_reads_every_byte_and_says_so(folder: Path) -> None:
    seen: list[int] = []
    b.Bundle.open(folder).verify(seen.append)
    assert sum(seen) == 30 + 90 + 50 + 120 + 40


def test_identity_depends_on_every_part_and_on_nothing_else(tmp_path: Path) -> None:
    one, two = make_bundle(tmp_path / "one"), make_bundle(tmp_path / "two")
    assert one.identity == two.identity == replace(one, name="renamed", parity=[]).identity
    for name in b.PARTS:
        other = {**one.files, name: b.FileEntry(one.files[name].size, "0" * 64)}
        assert replace(one, files=other).identity != one.identity


def test_missing_folder_and_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="does not exist"):
        b.Bundle.open(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"is not a bundle: it has no manifest\.json.*llava-edge export"):
        b.Bundle.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="is not a bundle"):
        b.Bundle.open(tmp_path / "file")
    with pytest.raises(BundleError, match="cannot be read"):
        b.Bundle.open(tmp_path / ("long" * 200))


# A manifest's text that is not a manifest at all: (text, what the sentence names).
TEXTS = {
    "empty": (b"", "not a valid manifest"),
    "not json": (b"GGUF\x03\x00\x00\x00", "not a valid manifest"),
    "web page": (b"<!DOCTYPE html><title>404</title>", "not a valid manifest"),
    "byte order mark": (b'\xef\xbb\xbf{"format_version": 1}', "not a valid manifest"),
    "UTF-16": ('{"format_version": 1}'.encode("utf-16"), "not a valid manifest"),
    "not UTF-8": (b'{"name": "\xff"}', "not a valid manifest"),
    "deep": (b"[" * 10_000, "not a valid manifest"),
    "deep object": (b'{"a":' * 10_000, "not a valid manifest"),
    "a number of 5000 digits": (b'{"format_version": ' + b"9" * 5000 + b"}", "not a valid manifest"),
    "a million entries": (b'{"files": {' + b'"a": 0,' * 10**6 + b'"b": 0}}', "larger than"),
    "list": (b"[]", "format version"),
    "null": (b"null", "format version"),
    "no version": (b"{}", "format version"),
    "newer version": (b'{"format_version": 2}', r"format version 2, this program reads version 1.*Update llava-edge"),
    "older version": (b'{"format_version": 0}', r"format version '0', .*Export the checkpoint again"),
    "version as text": (b'{"format_version": "1"}', "format version"),
    "only a version": (b'{"format_version": 1}', "it has no name"),
}


@pytest.mark.parametrize(("text", "named"), TEXTS.values(), ids=TEXTS)
def test_what_is_no_manifest_is_refused(folder: Path, text: bytes, named: str) -> None:
    (folder / b.MANIFEST).write_bytes(text)
    with pytest.raises(BundleError, match=named):
        b.Bundle.open(folder)


# A manifest of the right shape with one wrong thing in it: (change, what the sentence names).
CHANGES: dict[str, tuple[Change, str]] = {
    "path upwards": (lambda m: m["files"].update({"../../etc/passwd": m["files"][b.VISION]}), "wrong files"),
    "absolute path": (lambda m: m["files"].update({"/etc/passwd": m["files"][b.VISION]}), "wrong files"),
    "path with a dot": (lambda m: m["files"].update({"./vision.onnx": m["files"][b.VISION]}), "wrong files"),
    "other case": (lambda m: m["files"].update({"VISION.onnx": m["files"].pop(b.VISION)}), "wrong files"),
    "part not listed": (lambda m: m["files"].pop(b.PROJECTOR), r"missing \['projector.gguf'\]"),
    "weights not listed": (lambda m: m["files"].pop(b.VISION_DATA), "vision.onnx.data is not in the manifest"),
    "files as list": (lambda m: m.update(files=list(m["files"])), "files = .* expected"),
    "file as text": (
        lambda m: m["files"].update({b.VISION: "sha"}),
        "vision.onnx = 'sha'; expected a table of named values",
    ),
    "negative size": (lambda m: m["files"][b.VISION].update(size=-1), "manifest says -1"),
    "size as text": (lambda m: m["files"][b.VISION].update(size="300"), "size = .* expected"),
    "size as float": (lambda m: m["files"][b.VISION].update(size=300.0), "size = .* expected"),
    "size true": (lambda m: m["files"][b.VISION].update(size=True), "size = .* expected"),
    "size 2^63": (lambda m: m["files"][b.VISION].update(size=2**63), "manifest says 9223372036854775808"),
    "hash missing": (lambda m: m["files"][b.VISION].pop("sha256"), "it has no files.vision.onnx.sha256"),
    "version true": (lambda m: m.update(format_version=True), "format_version = .* expected"),
    "unknown field": (lambda m: m.update(surprise=1), r"unknown fields \['surprise'\]"),
    "unknown nested field": (lambda m: m["vision"].update(heads=1), r"unknown fields \['vision.heads'\]"),
    "other family": (lambda m: m.update(family="qwen"), "family = .* expected"),
    "family as list": (lambda m: m.update(family=["llava"]), "family = .* expected"),
    "unknown template": (lambda m: m.update(template="{{ messages }}"), "prompt template .* known: vicuna_v1"),
    "mean of two": (
        lambda m: m["preprocessing"].update(mean=[0.5, 0.5]),
        r"mean = .*; expected a list of 3 values",
    ),
    "mean true": (lambda m: m["preprocessing"].update(mean=[0.5, 0.5, True]), r"mean\[2\] = .* expected"),
    "mean infinite": (lambda m: m["preprocessing"].update(mean=[0.5, 0.5, 10**400]), r"mean\[2\] = .* expected"),
    "std zero": (lambda m: m["preprocessing"].update(std=[0.2, 0.0, 0.2]), "std that is not positive"),
    "image size zero": (lambda m: m["preprocessing"].update(image_size=0), "image_size 0"),
    "image size huge": (lambda m: m["preprocessing"].update(image_size=2**31), "image_size 2147483648"),
    "other squaring": (lambda m: m["preprocessing"].update(square="stretch"), "square = .* expected"),
    "no image tokens": (lambda m: m["vision"].update(image_tokens=0), "a size out of range"),
    "pool zero": (lambda m: m["vision"].update(image_pool=0), "a size out of range"),
    "width 2^63": (lambda m: m["vision"].update(width=2**63), "a size out of range"),
    "negative context": (lambda m: m["language"].update(context_length=-1), "a size out of range"),
    "vocabulary null": (lambda m: m["language"].update(vocab_size=None), "vocab_size = .* expected"),
    "terminal escape": (lambda m: m.update(name="\x1b]0;owned\x07"), "name = .* expected"),
    "lone surrogate": (lambda m: m.update(name="\ud800"), "name = .* expected"),
    "name as number": (lambda m: m.update(name=7), "name = .* expected"),
    "parity as object": (lambda m: m.update(parity={}), "parity = .* expected"),
    "parity row as list": (lambda m: m.update(parity=[[]]), r"parity\[0\] = \[\]; expected a table"),
    "one image marker": (lambda m: m.update(image_markers=["<im_start>"]), "1 image_markers; expected two or none"),
    "markers as text": (lambda m: m.update(image_markers="ab"), "image_markers = .* expected"),
    "unknown tokenization": (lambda m: m.update(after_control="none"), "after_control = .* expected"),
    "passed as number": (lambda m: m["parity"][0].update(passed=1), r"parity\[0\].passed = .* expected"),
}


@pytest.mark.parametrize(("change", "named"), CHANGES.values(), ids=CHANGES)
def test_hostile_manifests_are_refused_even_when_signed(folder: Path, change: Change, named: str) -> None:
    edit(folder, change)
    with pytest.raises(BundleError, match=named):
        b.Bundle.open(folder)


@pytest.mark.parametrize("text", [b"", b"{", b'{"format_version": 1, "surprise": 1}'])
def test_the_sentence_about_an_invalid_manifest_says_what_to_do(folder: Path, text: bytes) -> None:
    (folder / b.MANIFEST).write_bytes(text)
    with pytest.raises(BundleError, match=r"Export or pull the bundle again with this version of llava-edge\.$"):
        b.Bundle.open(folder)


@pytest.mark.parametrize("number", ["1e999", "-Infinity", "NaN"])
def test_numbers_that_are_not_finite_are_refused(folder: Path, number: str) -> None:
    path = folder / b.MANIFEST
    path.write_text(path.read_text("utf-8").replace("0.48145466", number), "utf-8")
    with pytest.raises(BundleError, match=r"mean\[0\] = .* expected"):
        b.Bundle.open(folder)


def test_a_key_that_was_added_a_second_time_is_refused(folder: Path) -> None:
    path = folder / b.MANIFEST
    path.write_text(path.read_text("utf-8").rstrip("}\n") + ', "name": "other"}', "utf-8")
    with pytest.raises(BundleError, match="changed after it was written"):
        b.Bundle.open(folder)


def test_optional_fields_may_be_absent(folder: Path) -> None:
    edit(folder, lambda raw: (raw.pop("parity"), raw.pop("provenance")))
    assert b.Bundle.open(folder).manifest.parity == []


def test_bundles_from_before_a_field_existed_mean_what_they_meant(folder: Path) -> None:
    """The checksum covers just the fields that the manifest has."""

    def older(raw: dict[str, Any]) -> None:
        del raw["image_markers"], raw["after_control"]
        for entry in raw["files"].values():
            del entry["sample"]
        del raw["preprocessing"]["grids"], raw["preprocessing"]["merge"]

    edit(folder, older)
    manifest = b.read_manifest(folder)
    assert (manifest.image_markers, manifest.after_control) == ([], "prefix")
    assert (manifest.preprocessing.grids, manifest.preprocessing.merge) == ((), "flat")
    b.Bundle.open(folder)


def test_a_bundle_without_external_weights_is_fine(folder: Path) -> None:
    (folder / b.VISION_DATA).unlink()
    edit(folder, lambda raw: raw["files"].pop(b.VISION_DATA))
    b.Bundle.open(folder).verify()


def test_a_valid_but_unsigned_change_is_refused(folder: Path) -> None:
    path = folder / b.MANIFEST
    path.write_text(path.read_text("utf-8").replace("0.48145466", "0.48145467"), "utf-8")
    with pytest.raises(BundleError, match="changed after it was written"):
        b.Bundle.open(folder)


def test_flipped_bits_in_the_manifest_are_found(folder: Path) -> None:
    """One random bit in every byte. A flip that changes nothing (1e-05 to 1E-05) may pass."""
    path, noise = folder / b.MANIFEST, random.Random(0)
    good, data = b.read_manifest(folder), path.read_bytes()
    refused = 0
    for i in range(len(data)):
        flipped = bytearray(data)
        flipped[i] ^= 1 << noise.randrange(8)
        path.write_bytes(flipped)
        try:
            assert b.read_manifest(folder) == good
        except BundleError:
            refused += 1
    assert refused >= len(data) - 2


def test_flipped_bits_in_the_parts_are_found_by_verify(folder: Path) -> None:
    noise, opened = random.Random(1), b.Bundle.open(folder)
    for name in b.PARTS:
        data = (folder / name).read_bytes()
        for _ in range(64):
            flipped = bytearray(data)
            flipped[noise.randrange(len(data))] ^= 1 << noise.randrange(8)
            (folder / name).write_bytes(flipped)
            with pytest.raises(BundleError, match=f"{name} is damaged or from another bundle"):
                opened.verify()
        (folder / name).write_bytes(data)
    opened.verify()


def test_a_part_of_another_model_of_the_same_size_is_refused_at_open(folder: Path) -> None:
    """Without reading all of it; what a sample cannot show, `verify` finds."""
    path, weights = folder / b.LANGUAGE, random.Random(0).randbytes(1 << 20)
    path.write_bytes(weights)
    manifest = b.read_manifest(folder)
    b.write_manifest(folder, replace(manifest, files={**manifest.files, b.LANGUAGE: b.file_entry(path)}))
    opened = b.Bundle.open(folder)
    for start, count in ((0, 1), (len(weights) - 1, 1), (len(weights) // 2, 1 << 16)):
        path.write_bytes(weights[:start] + bytes(count) + weights[start + count :])
        with pytest.raises(BundleError, match=r"language\.gguf is damaged or from another"):
            b.Bundle.open(folder)
    path.write_bytes(weights[:5000] + bytes(4000) + weights[9000:])
    b.Bundle.open(folder)
    with pytest.raises(BundleError, match=r"language\.gguf is damaged or from another"):
        opened.verify()


@pytest.mark.parametrize("name", b.PARTS)
def test_every_truncation_and_extension_is_found_at_open(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    for length in range(len(data)):
        (folder / name).write_bytes(data[:length])
        with pytest.raises(BundleError, match=f"{name} has {length} bytes"):
            b.Bundle.open(folder)
    (folder / name).write_bytes(data + b"\0")
    with pytest.raises(BundleError, match="truncated or from another"):
        b.Bundle.open(folder)
    (folder / name).unlink()
    with pytest.raises(BundleError, match="missing from the bundle"):
        b.Bundle.open(folder)


def test_all_mixes_of_three_bundles_are_refused(tmp_path: Path) -> None:
    """3^5 - 3 mixes; the first two bundles have parts of equal sizes, which only their content tells apart."""
    sources = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    make_bundle(sources[0], 0)
    make_bundle(sources[1], 1)
    make_bundle(sources[2], 2, sizes=(31, 91, 51, 121, 41))
    files = [{path.name: path.read_bytes() for path in source.iterdir()} for source in sources]
    mixes = [mix for mix in itertools.product(range(3), repeat=5) if len(set(mix)) > 1]
    assert len(mixes) == 240
    target = tmp_path / "mix"
    target.mkdir()
    for mix in mixes:
        for name, source in [(b.MANIFEST, mix[0]), *zip(b.PARTS, mix, strict=True)]:
            (target / name).write_bytes(files[source][name])
        with pytest.raises(BundleError, match="another bundle"):
            b.Bundle.open(target)


DOWNLOADS = {
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 300\n", "LFS pointer"),
    "web page": (b"\n<!DOCTYPE html>\n<html><body>404</body></html>", "web page"),
    "html fragment": (b"<html><body>Sign in</body></html>", "web page"),
}


@pytest.mark.parametrize("name", b.PARTS)
@pytest.mark.parametrize(("content", "hint"), DOWNLOADS.values(), ids=DOWNLOADS)
def test_a_download_of_something_else_is_named(folder: Path, name: str, content: bytes, hint: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(BundleError, match=hint):
        b.Bundle.open(folder)


@pytest.mark.parametrize("name", [b.MANIFEST, *b.PARTS])
@pytest.mark.parametrize("kind", ["symlink", "hardlink", "fifo", "folder", "device link", "dangling link"])
def test_only_plain_files_are_opened(folder: Path, name: str, kind: str) -> None:
    """A pipe would hang, a device would never end, a link may point anywhere."""
    path, aside = folder / name, folder.parent / "aside"
    path.rename(aside)
    if kind == "symlink":
        path.symlink_to(aside)
    elif kind == "hardlink":
        path.hardlink_to(aside)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device link" else "nowhere")
    with pytest.raises(BundleError, match="must be a regular file"):
        b.Bundle.open(folder)


@pytest.mark.parametrize("name", [b.VISION, b.VISION_DATA, b.LANGUAGE])
def test_a_part_that_may_not_be_read_is_named(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before an engine opens it. (Permissions would not stop tests that root runs.)"""
    opened = Path.open

    def refuse(path: Path, *arguments: Any, **named: Any) -> Any:
        if path == folder / name:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(BundleError, match=f"{name} cannot be read: Permission denied"):
        b.Bundle.open(folder)
