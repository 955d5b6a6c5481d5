"""Checkpoint -> bundle: the stage between the trainer (models/) and the runtime (runtimes/).

    checkpoint.py   a LLaVA of any layout -> one in-memory form (layouts.py, original.py, merge.py, names.py bring its
                    parts together; tensors.py reads the files)
    clip_onnx.py    vision tower -> vision.onnx          projector.py   -> projector.gguf
    llm_gguf.py     language model + tokenizer.py -> language.gguf; quantize.py runs llama.cpp's quantizer
    verify.py       reads the GGUF files back; parity.py measures every stage against PyTorch
    exporter.py     the steps in order, published by rename

Nothing here needs torch except `pytorch_model.bin` files and the parity table.
"""
