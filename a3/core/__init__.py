"""Errors, files, provenance, dtypes, memory: what knows nothing of models."""
