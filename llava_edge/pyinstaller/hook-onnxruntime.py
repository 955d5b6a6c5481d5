"""Read by PyInstaller where `onnxruntime` is imported, in place of the hook of pyinstaller-hooks-contrib."""

from __future__ import annotations

from PyInstaller.utils.hooks import collect_dynamic_libs

binaries = collect_dynamic_libs("onnxruntime")
excludedimports = ["onnxruntime.transformers.machine_info"]  # one line of a debugging aid, and with it 1.3 GB of torch
