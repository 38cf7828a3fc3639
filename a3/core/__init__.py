"""Code that does not depend on models: errors, files, provenance, dtypes, memory."""
