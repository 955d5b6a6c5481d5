"""Checkpoint -> bundle: the stage between the trainer (models/) and the runtime (runtimes/).

    checkpoint.py   a Hugging Face LLaVA folder -> one in-memory form (tensors.py reads the files)
    clip_onnx.py    vision tower -> vision.onnx          projector.py   -> projector.gguf
    llm_gguf.py     language model + tokenizer.py -> language.gguf; quantize.py runs llama.cpp's quantizer
    verify.py       reads everything back and measures it against PyTorch
    exporter.py     the steps in order, published by rename

Nothing here needs torch except `pytorch_model.bin` files and the parity table.
"""
