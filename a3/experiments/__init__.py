"""What a configuration asks for: its rows, the catalogue, the paper's tables."""
