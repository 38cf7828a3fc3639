"""Tables, figures, the report page and model cards, from artifacts."""
