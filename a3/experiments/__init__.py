"""The configuration, the rows of experiment tables, the catalogue, and the paper's tables."""
