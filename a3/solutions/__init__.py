"""Closed-form solutions: a mode is one small pure function (weights, Rxx, rank) -> factors."""
