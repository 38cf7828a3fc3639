"""Stage collect: computes statistics (Rxx) of a model on a text."""
