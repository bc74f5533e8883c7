"""Dictionaries side by side: the same activations, the same budget (Table 1).

In reading order: `experiment` (what all share), `dictionaries` (from a few words or a file), `run` (`compare`),
`results`.
"""
