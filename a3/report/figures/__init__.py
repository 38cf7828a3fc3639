"""Figures: SVG and PNG."""
