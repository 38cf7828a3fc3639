"""Stage approx: weights and statistics to a smaller checkpoint."""
