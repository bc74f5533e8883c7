"""Activations as entropy-coded bits in a file, and back (section 5)."""
