"""Read by PyInstaller where `llava_edge` is imported: the engines, which are loaded by name, and what they read."""

from __future__ import annotations

from PyInstaller.utils.hooks import collect_data_files, collect_dynamic_libs

from llava_edge.runtimes import probe

probe.require_working_build()  # nobody checks it where the app runs

hiddenimports = ["llava_edge.api", "onnxruntime"]
# What runtimes/bindings.py executes as files, and what these import, which PyInstaller does not see.
datas = collect_data_files("llama_cpp", True, includes=["__init__.py", "_ctypes_extensions.py", "llama_cpp.py"])
hiddenimports += ["ctypes", "functools", "pathlib", "typing_extensions", "warnings"]
binaries = collect_dynamic_libs("llama_cpp")
# Its version is read there, for the settings that were measured for it.
datas += collect_data_files("onnxruntime", True, includes=["__init__.py"])
# With these the key of native kernels is the one under which they were built for this machine.
datas += collect_data_files("llava_edge.runtimes.native", True, excludes=["**/__pycache__/*"])
