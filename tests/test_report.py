"""The report's numbers: by hand where they can be, against PyTorch where they cannot, and at the command line."""

from __future__ import annotations

import json
import os
from math import exp, log
from pathlib import Path

import numpy as np
import pytest
import whole
from click.testing import CliRunner
from gguf import GGUFReader

from llava_edge.bundle import Bundle
from llava_edge.cli import cli
from llava_edge.errors import CannotCreateError, DataError, MissingError
from llava_edge.export import held_out, importance, parity, report
from llava_edge.export.checkpoint import open_checkpoint
from llava_edge.export.quantize import QUANTS, quantize
from llava_edge.export.samples import held_out as held_out_drawings
from llava_edge.image import load_image, preprocess
from llava_edge.models import micro
from llava_edge.models.data import control_id, load_tokenizer, read_records, tokenize
from llava_edge.prompt import IGNORE_INDEX
from llava_edge.runtimes.language import LanguageModel


def test_scores_by_hand() -> None:
    half, other = np.log([[0.5, 0.25, 0.25]]), np.log([[0.125, 0.5, 0.375]])
    kl, loss, same = report.compare(half, other, [2])[0]
    assert kl == pytest.approx(0.5 * log(4) - 0.25 * log(2) - 0.25 * log(1.5))  # the other way round it would be less
    assert (loss, same) == (pytest.approx(log(8 / 3)), 0)
    shifted = report.compare(half, half + 7, [0])[0]  # logits may be shifted, the distribution is the same
    np.testing.assert_allclose(shifted, [0, log(2), 1], atol=1e-12)


def test_a_uniform_model_has_the_vocabulary_for_perplexity() -> None:
    scores = report.compare(np.zeros((5, 265)), np.zeros((5, 265), np.float32), [0, 1, 2, 3, 264])
    assert exp(scores[:, 1].mean()) == pytest.approx(265)
    assert not scores[:, 0].any()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions on four pictures, one record of two turns and one without a picture."""
    folder = tmp_path_factory.mktemp("data")
    micro.write_data(folder, pictures=4, seed=3)
    records = json.loads((folder / "questions.json").read_text("utf-8"))
    records[0]["conversations"] += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "the red one"}]
    records.append({"id": "text", "conversations": records[2]["conversations"][1:] * 2})
    (folder / "questions.json").write_text(json.dumps(records), "utf-8")
    return folder / "questions.json"


def test_predictions_are_those_of_pytorch_for_every_answer_token(
    data: Path, float16: Path, micro_checkpoint: Path, micro_bundle: Path, tmp_path: Path
) -> None:
    bundle, checkpoint = Bundle.open(micro_bundle), open_checkpoint(micro_checkpoint)
    samples, pictures = held_out.read_conversations(data, bundle, float16, tmp_path)
    tokenizer = load_tokenizer(micro_checkpoint / "tokenizer.json")
    wanted = {}
    for record in (record for record in read_records(data) if "image" in record):
        trained = tokenize(record, "chatml", tokenizer, 512)
        pixels = preprocess(load_image(data.parent / record["image"]), bundle.manifest.preprocessing)
        shown = whole.shown(checkpoint.config, checkpoint.tensors, [pixels[None]])
        logits = whole.logits(checkpoint.config, checkpoint.tensors, trained.ids, shown)
        rows = len(logits) - len(trained.ids) + 1
        sample = held_out.expand_image(trained.ids, trained.labels, record["image"], rows)
        wanted[sample] = logits[np.array(sample.answers) - 1]
        assert sample.targets == [label for label in trained.labels if label != IGNORE_INDEX]
        assert sample.targets[-1] == control_id(tokenizer, "<|im_end|>")
    assert set(samples) == wanted.keys()
    assert len(samples) == 8
    with LanguageModel(float16, context=256) as engine:
        for sample in samples:  # neighbours share a picture, which is then not evaluated again
            ours = np.stack([row.copy() for row in held_out.predictions(engine, sample, pictures)])
            assert np.abs(ours - wanted[sample]).max() < 0.02 * np.abs(wanted[sample]).max()
            early = wanted[sample][:-1]  # negative control: one position off is not the same
            assert np.abs(ours[1:] - early).max() > 0.2 * np.abs(early).max()
            again = np.stack([row.copy() for row in held_out.predictions(engine, sample, pictures)])
            assert np.abs(again - ours).max() < 0.02 * np.abs(ours).max()  # all but the answer is known


def test_the_answers_of_drawings_are_the_models_own(float16: Path, micro_bundle: Path, tmp_path: Path) -> None:
    samples, pictures = held_out.sample_conversations(Bundle.open(micro_bundle), float16, tmp_path)
    assert len(samples) == 12
    with LanguageModel(float16, context=256) as engine:
        for sample in samples:
            likely = [int(row.argmax()) for row in held_out.predictions(engine, sample, pictures)]
            assert likely == sample.targets
    calibrated = {image.tobytes() for image in importance.pictures(None)}
    assert not calibrated & {image.tobytes() for image in held_out_drawings()}


def test_the_report_of_an_export(micro_checkpoint: Path, float16: Path, data: Path, tmp_path: Path) -> None:
    """It measures with a matrix, too; the file that is shipped has none unless it was asked for."""
    arguments = ["export", str(micro_checkpoint), str(tmp_path / "out"), "--vision", "fp32", "--json"]
    arguments += ["--report", str(tmp_path / "report.md"), "--report-data", str(data)]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.stderr
    printed = json.loads(done.stdout)
    rows = {(row["quant"], row["image_aware"]): row for row in printed["report"]["rows"]}
    assert list(rows) == list(report.MEASURED)
    assert {quant for quant, _ in rows} == set(QUANTS)
    exact = rows["f16", False]
    assert exact["kl"] == 0
    assert exact["agreement"] == 1
    order = [rows[quant, False] for quant in ("f16", "q8_0", "q5_k_m", "q4_k_m", "q4_0")]
    assert sorted((row["size"] for row in order), reverse=True) == [row["size"] for row in order]
    assert sorted(row["kl"] for row in order) == [row["kl"] for row in order]
    aware = rows["q4_k_m", True]
    assert aware["kl"] != rows["q4_k_m", False]["kl"]
    assert aware["size"] == rows["q4_k_m", False]["size"] == printed["files"]["language.gguf"]["size"]
    assert printed["language"]["calibration"] == ""
    assert printed["report"]["calibration"] == "4 drawings, image weight 0.5"
    plain = tmp_path / "plain.gguf"
    quantize(float16, plain, "q4_k_m")
    shipped, wanted = (GGUFReader(path).tensors for path in (tmp_path / "out" / "language.gguf", plain))
    assert all(np.array_equal(ours.data, theirs.data) for ours, theirs in zip(shipped, wanted, strict=True))
    table = (tmp_path / "report.md").read_text("utf-8").splitlines()
    assert any(line.startswith("| q4_k_m, image-aware | ") and f"| {aware['kl']:.5f} |" in line for line in table)
    assert sum(line.startswith("| q") for line in table) == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plain.gguf", "report.md"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"manifest.json", *printed["files"]}


def test_the_matrix_of_an_export_reaches_the_file(
    micro_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "unavailable_reason", lambda: "of no interest here")
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for n, colour in enumerate(micro.COLOURS):
        micro.draw(colour, rng).save(tmp_path / "photos" / f"{n}.png")
    for name, how in (("plain", []), ("aware", ["--calibrate", str(tmp_path / "photos")])):
        arguments = ["export", str(micro_checkpoint), str(tmp_path / name), "--vision", "fp32"]
        assert CliRunner().invoke(cli, [*arguments, *how]).exit_code == 0
    manifests = [Bundle.open(tmp_path / name).manifest for name in ("plain", "aware")]
    plain, aware = (manifest.files["language.gguf"] for manifest in manifests)
    assert plain.size == aware.size
    assert plain.sha256 != aware.sha256
    assert [manifest.language.calibration for manifest in manifests] == ["", "6 pictures, image weight 0.5"]
    shown = CliRunner().invoke(cli, ["info", str(tmp_path / "aware")])
    assert "q4_k_m, calibrated on 6 pictures" in shown.stdout


def test_what_cannot_be_measured_on_is_said(float16: Path, micro_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text('[{"id": "1", "conversations": []}]', "utf-8")
    with pytest.raises(DataError, match="no conversation about a picture"):
        held_out.read_conversations(tmp_path / "text.json", Bundle.open(micro_bundle), float16, tmp_path)
    with pytest.raises(MissingError):
        held_out.read_conversations(tmp_path / "none.json", Bundle.open(micro_bundle), float16, tmp_path)
    options = ["export", str(tmp_path), str(tmp_path / "out"), "--report", str(tmp_path / "no" / "report.md")]
    assert isinstance(CliRunner().invoke(cli, options).exception, CannotCreateError)


@pytest.mark.parametrize("fault", ["picture", "damaged picture", "turns"])
def test_data_that_no_report_can_be_measured_on_is_refused_before_anything_is_written(
    fault: str, micro_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    """The report comes last: hours of exporting would be lost."""
    records = json.loads(data.read_text("utf-8"))[:3]
    for record in records:
        (tmp_path / record["image"]).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / record["image"]).write_bytes((data.parent / record["image"]).read_bytes())
    if fault == "picture":
        (tmp_path / records[1]["image"]).unlink()
    elif fault == "damaged picture":
        os.truncate(tmp_path / records[1]["image"], 60)
    else:
        records[1]["conversations"][0]["value"] += " <image>"
    (tmp_path / "some.json").write_text(json.dumps(records), "utf-8")
    arguments = ["export", str(micro_checkpoint), str(tmp_path / "out"), "--report", str(tmp_path / "report.md")]
    done = CliRunner().invoke(cli, [*arguments, "--report-data", str(tmp_path / "some.json")])
    assert isinstance(done.exception, MissingError if fault == "picture" else DataError)
    assert (records[1]["image"] if "picture" in fault else repr(records[1]["id"])) in str(done.exception)
    assert "vision tower" not in done.stderr


def test_a_report_that_could_not_be_written_is_refused_before_anything_is_measured(
    micro_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    """Nor may it be written into the bundle, which could then not be replaced, or over anything but a report."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    kept = data.read_bytes()
    for out, path, why in (
        ("out", tmp_path / "folder", "it is a folder"),
        ("out", micro_checkpoint / "config.json", "is not an earlier report"),
        ("out", tmp_path / "out", "is also given for something else"),
        ("out", tmp_path / "model-mmproj.gguf", "is also given for something else"),
        ("folder", tmp_path / "folder" / "report.md", "would be inside the bundle"),
        ("folder", tmp_path / "link" / "report.md", "would be inside the bundle"),
        ("out", data, "is not an earlier report"),
    ):
        arguments = ["export", str(micro_checkpoint), str(tmp_path / out)]
        arguments += ["--emit-mmproj", str(tmp_path / "model-mmproj.gguf")]
        done = CliRunner().invoke(cli, [*arguments, "--report", str(path), "--report-data", str(data)])
        assert isinstance(done.exception, CannotCreateError)
        assert why in str(done.exception)
    assert data.read_bytes() == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link"]
    assert list((tmp_path / "folder").iterdir()) == []
