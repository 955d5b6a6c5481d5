"""Dependencies point one way, engines load late, and the tree names no folder of one particular machine."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from llava_edge.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
AREAS = ("export", "models", "runtimes")

# What each part of llava_edge may import, besides itself. SHARED modules import only one another.
SHARED = {
    *("anyres", "bundle", "cache", "errors", "gguf", "image", "image_format", "interpreter", "interrupts"),
    *("json_schema", "locks", "options", "outputs", "paths", "placeholder", "prompt", "protobuf", "store"),
    *("templates", "token_budget", "transcript", "typed"),
}
LIBRARY = ("api", "asynchronous", "conversation", "question")
ALLOWED = {
    "json_schema": {"errors", "options"},
    "models": SHARED,
    "runtimes": SHARED,
    "export": SHARED | {"models", "runtimes"},
    **dict.fromkeys(LIBRARY, SHARED | {"runtimes", *LIBRARY}),
    "server": SHARED | {"api", "runtimes"},
    "repl": SHARED | {"conversation", "runtimes"},
    "bench": SHARED | {"runtimes"},
    "pyinstaller": SHARED | {"runtimes"},
    "cli": SHARED | {"api", "bench", "repl", "server", *AREAS},
    "__init__": SHARED | {"api", "conversation"},
    "__main__": {"cli", "errors"},
}

# Packages that are slow to import or not always installed, and the only parts that may name them.
HOMES = {
    "torch": {"models", "export"},
    "onnx": {"export", "models"},
    "safetensors": {"export", "models"},
    "tokenizers": {"export", "models"},
    "matplotlib": {"models"},
    "onnxruntime": {"runtimes"},
    "llama_cpp": {"runtimes"},
    "llguidance": {"runtimes", "json_schema"},
    "transformers": set(),
    "sentencepiece": set(),
    "starlette": {"server"},
    "uvicorn": {"server"},
}


def modules() -> Iterator[tuple[str, Path]]:
    """(dotted name below llava_edge, file), each file once."""
    for path in sorted((ROOT / "llava_edge").rglob("*.py")):
        parts = path.relative_to(ROOT / "llava_edge").with_suffix("").parts
        if parts[0] not in AREAS:
            yield ".".join(parts), path
    for area in AREAS:
        for path in sorted((ROOT / area).rglob("*.py")):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path


@cache
def imports(path: Path) -> list[str]:
    """Every module that is imported anywhere in a file, late and by `import_module("name")` too."""
    return list(_imports(path))


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "llava_edge":
            yield from (f"llava_edge.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield str(ast.literal_eval(node.args[0])) if isinstance(node.args[0], ast.Constant) else ""


def part_of(name: str) -> str:
    return name.split(".")[0]


def test_every_import_points_down() -> None:
    files = {part_of(name) for name, _ in modules()}
    assert {"api", "bundle", "cli", *AREAS} <= files
    wrong = []
    for name, path in modules():
        part = part_of(name)
        for target in imports(path):
            if not target.startswith("llava_edge.") or part_of(target[len("llava_edge.") :]) not in files:
                continue
            wanted = part_of(target[len("llava_edge.") :])
            if wanted not in {part, *ALLOWED.get(part, SHARED)}:
                wrong.append(f"{name} imports {target}")
    assert wrong == []


def test_engines_are_named_only_where_they_live() -> None:
    wrong = []
    for name, path in modules():
        for target in imports(path):
            if part_of(name) not in HOMES.get(part_of(target), {part_of(name)}):
                wrong.append(f"{name} imports {target}")
    assert wrong == []


def test_the_import_check_sees_late_and_indirect_imports(tmp_path: Path) -> None:
    source = "def f():\n import torch\n from llava_edge import api\n importlib.import_module('onnx.helper')\n"
    (tmp_path / "x.py").write_text(source, "utf-8")
    assert set(imports(tmp_path / "x.py")) == {"torch", "llava_edge.api", "onnx.helper"}


def loaded_after(code: str, *blocked: str) -> set[str]:
    """Top-level packages in a fresh interpreter after `code`; importing one of `blocked` fails there."""
    script = f"import sys, json\nsys.modules.update(dict.fromkeys({blocked!r}))\n{code}\n"
    script += "sys.stderr.write('\\n' + json.dumps([n.split('.')[0] for n, m in sys.modules.items() if m]))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loaded_after("import llava_edge") & {"numpy", "PIL", "click", *HOMES}


def test_help_loads_no_engine() -> None:
    code = "from llava_edge.cli import execute\n"
    for arguments in (["--help"], *([name, "--help"] for name in COMMANDS)):
        code += f"assert execute({arguments!r}) == 0\n"
        code += f"assert not {{'numpy', *{sorted(HOMES)!r}}} & sys.modules.keys(), {arguments!r}\n"
    assert "click" in loaded_after(code)


def test_the_runtime_needs_no_extra() -> None:
    others = ("export", "models", "server", "pyinstaller", "__main__")
    names = [f"llava_edge.{name}" for name, _ in modules() if part_of(name) not in others]
    code = "\n".join(f"import {name.removesuffix('.__init__')}" for name in names)
    assert "llava_edge" in loaded_after(code, *(set(HOMES) - {"onnxruntime", "llama_cpp", "llguidance"}), "gguf")


def test_the_exporter_needs_no_torch() -> None:
    names = [f"llava_edge.{name}" for name, _ in modules() if part_of(name) == "export"]
    assert names
    code = "\n".join(f"import {name.removesuffix('.__init__')}" for name in names)
    loaded_after(code, "torch", "transformers", "tokenizers", "sentencepiece", "matplotlib")


def test_nobody_is_sent_to_a_package_index_for_llava_edge() -> None:
    """Somebody else may have the name there."""
    folders = ["llava_edge", *AREAS, "examples", "benchmarks", "docs", "scripts"]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md", ".sh")]
    files += ROOT.glob("*.md")
    pattern = re.compile(r"llava[-_]edge\[|pip install '?llava[-_]edge")
    assert len(files) > 100
    assert [(path, match[0]) for path in files for match in pattern.finditer(path.read_text("utf-8"))] == []


def test_no_folder_of_one_machine_is_named() -> None:
    folders = ["llava_edge", *AREAS, "tests", "scripts", "docs", "benchmarks", ".ci"]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    files += [path for path in ROOT.iterdir() if path.suffix in (".md", ".toml", ".py") or path.name == "Makefile"]
    texts = [path for path in files if path.suffix in (".py", ".md", ".toml", ".sh", ".json", "") and path.is_file()]
    assert len(texts) > 20
    pattern = re.compile(r"(?<![\w.~])/(work|home|root|Users|mnt|opt|srv)/\w")
    found = [(path, match[0]) for path in texts for match in pattern.finditer(path.read_text("utf-8"))]
    assert found == []
