"""Stage export: compressed models for other runtimes."""
