"""The stages: each reads files and writes files."""
