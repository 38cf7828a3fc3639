"""Probes: whether a3 can compress a model type that it has no adapter for, shown by numbers."""
