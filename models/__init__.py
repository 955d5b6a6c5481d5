"""LLaVA in PyTorch, its data, its trainer and the recipes of the models we train. Never weights.

`config` and `smol` import no torch, so that the exporter can use them where torch is not installed.
"""
