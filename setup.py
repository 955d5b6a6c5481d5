"""Package metadata, and the map from the folders export/, models/ and runtimes/ to `llava_edge.*`.

The symlinks in llava_edge/ let a clone that is not installed, editors and mypy find the same modules; nothing that
is installed depends on them. `find_packages` would follow them and list everything twice, hence the explicit map.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
AREAS = ("export", "models", "runtimes")

packages = ["llava_edge"]
packages += [f"llava_edge.{name}" for name in find_packages("llava_edge", exclude=[*AREAS, *(f"{a}.*" for a in AREAS)])]
for area in AREAS:
    packages += [f"llava_edge.{area}", *(f"llava_edge.{area}.{name}" for name in find_packages(area))]

version = re.search(r'^__version__ = "(.+)"$', (ROOT / "llava_edge/__init__.py").read_text("utf-8"), re.MULTILINE)
assert version, "llava_edge/__init__.py has no __version__ line"

# The runtime needs no torch; neither does turning a checkpoint into a bundle.
RUNTIME = [
    "numpy>=2.0",
    "pillow>=12.3",  # older releases have known decoder faults, and pictures come from anywhere
    "onnxruntime>=1.24",
    "llama-cpp-python==0.3.36",  # exact: its C structures are used directly, and they change between releases
    "llguidance>=1.9",  # older ones do not follow all JSON schemas that this one does
    "click>=8.2",
]
EXPORT = ["onnx>=1.22", "gguf>=0.19", "safetensors>=0.7"]
TRAIN = [
    *EXPORT,
    "torch==2.13.0",  # exact: trained with it, and a range would pull in whichever build is newest
    "tokenizers>=0.22",
    "matplotlib>=3.10.8",  # 3.10.0 warns with today's pyparsing
    "resvg-py>=0.5",  # draws the emoji that `smol` is trained on
]
SERVE = ["starlette>=1.0", "uvicorn>=0.40"]
DEV = [
    *TRAIN,
    *SERVE,
    "openai>=2",  # the clients the server is tested with
    "ollama>=0.6.2",  # from here on its client can be closed
    "transformers>=4.57.6,<5",  # the reference the tests compare with; 5.x changed the image processors
    "optimum-onnx>=0.1",  # likewise, for CLIP in ONNX
    "sentencepiece>=0.2.2",  # 0.2.1 dies in a process that has loaded the rest
    "hypothesis>=6.150",
    "pytest>=9",
    "pytest-xdist>=3.8",
    "ruff>=0.17,<0.18",  # a new minor release brings new rules
    "mypy>=2.4,<2.5",
    "setuptools>=77",  # tests build the wheel without an isolated environment
]

setup(
    name="llava-edge",
    version=version[1],
    description="Quantized LLaVA on your own machine: CLIP in ONNX Runtime, LLaMA in llama.cpp.",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=packages,
    package_dir={f"llava_edge.{area}": area for area in AREAS},
    package_data={
        "llava_edge": ["py.typed", "zoo/**", "server/page/*"],
        "llava_edge.models": ["recipes/*"],
        "llava_edge.runtimes.native": ["src/*"],
    },
    include_package_data=False,
    install_requires=RUNTIME,
    extras_require={"export": EXPORT, "train": TRAIN, "serve": SERVE, "dev": DEV},
    entry_points={
        "console_scripts": ["llava-edge = llava_edge.__main__:main"],
        "pyinstaller40": ["hook-dirs = llava_edge.pyinstaller:hook_dirs"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: POSIX :: Linux",
        "Operating System :: MacOS",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    zip_safe=False,
)
