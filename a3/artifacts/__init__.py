"""Where artifacts lie in a results folder, and reading them back."""
