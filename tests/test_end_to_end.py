"""The whole chain for real: train, export to four bits, ask on the command line; the answer is true."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from llava_edge.cli import cli
from llava_edge.export.exporter import ExportOptions, export
from llava_edge.models import micro


@pytest.fixture(scope="module")
def bundle(trained_micro: Path) -> Path:
    """The trained micro model at 4 bits with an int8 vision tower."""
    out = trained_micro.parent / "bundle"
    manifest = export(ExportOptions(trained_micro, out, quant="q4_k_m", vision="int8"))
    assert all(row.passed for row in manifest.parity)
    return out


@pytest.mark.parametrize("colour", micro.COLOURS)
def test_a_picture_on_standard_input_is_answered_truly(colour: str, bundle: Path) -> None:
    png = io.BytesIO()
    micro.draw(colour, np.random.default_rng(7), (90, 60)).save(png, "PNG")
    arguments = ["run", "--model", str(bundle), "--image", "-", "--prompt", micro.QUESTION]
    result = CliRunner().invoke(cli, arguments, input=png.getvalue())
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == colour


def test_the_json_object_tells_the_same_with_numbers(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    micro.draw("blue", np.random.default_rng(8)).save(path)
    arguments = ["run", "--model", str(bundle), "--image", str(path), "--prompt", micro.QUESTION, "--json"]
    result = json.loads(CliRunner().invoke(cli, arguments).stdout)
    assert (result["text"], result["finish_reason"]) == ("blue", "stop")
    assert result["image_tokens"] == micro.CONFIG.image_tokens
    assert result["completion_tokens"] >= 1
    assert result["timings"]["ttft_ms"] <= result["timings"]["total_ms"]
