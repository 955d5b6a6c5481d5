"""Checkpoint -> bundle: the stage between the trainer (models/) and the runtime (runtimes/).

torch is needed only for `pytorch_model.bin`, the parity table, importance matrices and conversations.
"""
