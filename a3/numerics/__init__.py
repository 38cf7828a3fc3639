"""Linear algebra and number formats: pure functions of tensors."""
