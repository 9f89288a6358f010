"""The language model, its parts, and what they cost."""
