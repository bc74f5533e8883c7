"""Dictionaries side by side: the same activations, the same budget (Table 1)."""
