"""README and docs/ cannot rot: their commands parse, their links and files exist, their Python runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
from PIL import Image

from llava_edge.bundle import read_manifest
from llava_edge.cli import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHER_PAGES = [ROOT / "benchmarks/README.md", ROOT / "CONTRIBUTING.md", ROOT / "llava_edge/zoo/smol/MODEL_CARD.md"]


def code_lines(page: Path) -> list[str]:
    """Lines inside fenced code blocks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [line.strip().removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def code_in_text(page: Path) -> list[str]:
    """What stands between backticks outside of fenced blocks, lines joined."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def help_lines() -> list[str]:
    """Lines of all help texts of commands, with their examples."""
    with click.Context(cli) as context:
        commands = [cli.get_command(context, name) for name in cli.list_commands(context)]
    return [line.strip() for command in [cli, *commands] if command for line in (command.help or "").splitlines()]


CODE = [line for page in PAGES + OTHER_PAGES for line in code_lines(page) + code_in_text(page)]
COMMANDS = sorted({line for line in CODE + help_lines() if re.match(r"llava-edge (\w+ .|bench|serve)", line)})
SCRIPTS = sorted({line for line in CODE if line.startswith("python benchmarks/")})


def parse(line: str) -> click.Context:
    """The context click would run a command line in, options checked; nothing is run."""
    words = shlex.split(re.split(r"\s[|>#]", line)[0])[1:]
    context = cli.make_context("llava-edge", list(words))
    command: click.Command = cli
    rest = words
    while isinstance(command, click.Group):
        name, found, rest = command.resolve_command(context, rest)
        assert found is not None
        context = found.make_context(name, list(rest), parent=context)
        command = found
    return context


@pytest.fixture
def as_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that has the files and folders the commands name."""
    for line in COMMANDS:
        for word in shlex.split(line)[2:]:
            path = tmp_path / word
            if Path(word).suffix in (".jpg", ".png"):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            elif "/" in word and not Path(word).suffix:
                path.mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path)


def test_there_are_commands() -> None:
    assert any(line.startswith("llava-edge run --image") for line in COMMANDS)


@pytest.mark.usefixtures("as_reader")
@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_parses(line: str) -> None:
    parse(line)


@pytest.mark.usefixtures("as_reader")
@pytest.mark.parametrize(
    "line", ["llava-edge rnu", "llava-edge run --picture photo.jpg", "llava-edge run --max-tokens many"]
)
def test_a_wrong_command_does_not_parse(line: str) -> None:
    with pytest.raises(click.UsageError):
        parse(line)


@pytest.mark.parametrize("line", SCRIPTS)
def test_every_benchmark_and_its_options_exist(line: str) -> None:
    _, script, *words = line.split()
    source = (ROOT / script).read_text("utf-8")
    assert [word for word in words if word.startswith("--") and f'"{word}"' not in source] == []


@pytest.mark.parametrize("page", PAGES + OTHER_PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


def test_the_map_names_every_module_and_nothing_else() -> None:
    """Names that end in / or have a suffix, indented by folder."""
    text = (ROOT / "README.md").read_text("utf-8").split("## Map of the repository")[1]
    tree = re.findall(r"```\n(.*?)```", text, re.DOTALL)[0]
    folder, named = ROOT, set()
    for indent, name in re.findall(r"^( *)([\w./-]+)(?= )", tree, re.MULTILINE):
        path = (folder if indent else ROOT) / name
        folder = folder if indent else path
        named.add(path)
    assert [path for path in sorted(named) if not path.exists()] == []
    shown = ("llava_edge", "llava_edge/json_schema", "llava_edge/server", "export", "models", "runtimes")
    folders = [ROOT / name for name in shown]
    modules = {path for folder in folders for path in folder.glob("*.py") if not path.name.startswith("__")}
    assert modules - named == set()


def test_the_table_of_extras_is_that_of_setup_py(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row may begin with other extras that it contains."""
    metadata: dict[str, Any] = {}
    monkeypatch.setattr("setuptools.setup", metadata.update)
    exec(compile((ROOT / "setup.py").read_text("utf-8"), ROOT / "setup.py", "exec"), {"__file__": ROOT / "setup.py"})
    required = {"(none)": metadata["install_requires"], **metadata["extras_require"]}
    packages = {extra: {re.split("[=><]", line)[0] for line in lines} for extra, lines in required.items()}
    rows = re.findall(
        r"^\| (\(none\)|`\[\w+\]`) \|.*\| (.*) \|$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE
    )
    shown: dict[str, set[str]] = {}
    for extra, installs in rows:
        names = set(installs.split(", "))
        if "all of the above" in names:
            names |= set().union(*(shown[above] for above in shown if above != "(none)"))
        if "those of `[export]`" in names:
            names |= shown["export"]
        shown[extra.strip("`[]")] = {name for name in names if " of " not in name}
    assert shown == packages


EXAMPLES = [
    code
    for page in PAGES
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
]


def test_there_are_examples() -> None:
    assert len(EXAMPLES) > 2


@pytest.mark.parametrize("code", [code for code in EXAMPLES if "http://" not in code])
def test_python_examples_run(
    code: str, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As written, in a folder with the photo they name; the trained micro model stands in for `smol`."""
    models = tmp_path / "home" / "models"
    models.mkdir(parents=True)
    (models / "smol").symlink_to(colours)
    monkeypatch.setenv("LLAVA_EDGE_HOME", str(tmp_path / "home"))
    Image.new("RGB", (60, 40), "red").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("code", [code for code in EXAMPLES if "http://" in code])
def test_client_examples_run(
    code: str, micro_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against a server with the micro model, at its port and by its name."""
    pytest.importorskip("openai", reason="the openai client is not installed")
    from serving import running

    Image.new("RGB", (60, 40), "red").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    with running(micro_bundle, tmp_path) as server:
        here = code.replace(":8080", f":{server.port}").replace('"smol"', '"micro"')
        assert here != code
        exec(compile(here, "example", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


def test_the_parity_table_is_the_manifests() -> None:
    """Row by row in its order: largest difference, relative difference, and what is judged by."""
    text = (ROOT / "README.md").read_text("utf-8").split("| stage | largest difference |")[1].split("\n\n")[0]
    shown = [[cell.strip() for cell in line.split("|")[2:5]] for line in text.splitlines()[2:]]
    manifest = read_manifest(ROOT / "llava_edge/zoo/smol")
    measured = [row for row in manifest.parity if not row.stage.startswith("greedy q")]  # one row there
    assert len(shown) == len(measured)
    for (largest, relative, judged), row in zip(shown, measured, strict=True):
        assert float(largest) == pytest.approx(row.max_abs, rel=0.06)
        assert float(relative) == pytest.approx(row.relative, rel=0.06)
        if "equal" not in judged:
            sign = ">=" if row.measure == "cosine" else "<="
            limit = re.fullmatch(rf"{row.measure} ?([\d.]*) {sign} ([\d.e-]+)", judged)
            assert limit, judged
            assert float(limit[2]) == row.limit
            assert not limit[1] or abs(float(limit[1]) - row.value) < 1e-5
