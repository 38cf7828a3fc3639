"""Descriptions of model families, and the compressed model that transformers loads."""
