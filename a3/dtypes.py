"""Bytes of one number. In a module of its own, which everything may import at no cost."""

WIDTHS = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
