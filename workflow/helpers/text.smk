"""Helpers of rules/text.smk: what its jobs read and are told."""

from a3.experiments.config import excluded


def excluded_by(text):
    """The texts whose documents are taken out of a text."""
    entry("texts", text)
    return excluded(text, C["texts"])
