"""Jobs: what they will cost, and cleaning up after a killed run."""
