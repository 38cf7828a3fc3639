"""What model families look like, and the compressed model that Hugging Face loads."""
