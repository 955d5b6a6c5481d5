"""JSON schemas -> grammars in GBNF, which llama.cpp makes an answer follow."""
