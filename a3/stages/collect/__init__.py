"""Stage collect: model and text to statistics (Rxx)."""
