"""bundle -> answer: the only home of onnxruntime and llama.cpp. Knows nothing about HTTP, terminals or training.

vision.py     pixels -> CLIP features            projector.py  features -> image embeddings
language.py   tokens and embeddings -> logits    sampling.py   logits -> token
text.py       token bytes -> text                pipeline.py   all of it, one stream of chunks
devices.py    processor, memory, accelerators    probe.py      does the llama.cpp build work here?
limits.py     what the processor can do at most  native/       kernels of ours inside llama.cpp
"""

from __future__ import annotations


class CancelledError(Exception):
    """Work was stopped because its caller asked for that; never leaves this package."""
