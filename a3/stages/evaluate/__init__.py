"""Stage evaluate: perplexity, harness, generation, speed."""
