"""LLaVA in PyTorch, its trainer, and the data and recipes of the models we train. Holds no weights.

`config` and `smol` import no torch, so that the exporter can use them without it.
"""
