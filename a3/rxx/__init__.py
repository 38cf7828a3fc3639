"""Statistics (Rxx): their kinds and their container."""
