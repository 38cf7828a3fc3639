"""Stages model, text, train: what the workflow starts from."""
