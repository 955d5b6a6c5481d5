"""JSON schemas -> grammars that an answer follows."""
