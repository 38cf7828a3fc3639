"""Statistics (Rxx): the kinds that there are, and their container."""
