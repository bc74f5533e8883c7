"""The entropy of sets of activations (section 3): known entropies, and a language model's by layer and position.

In reading order: `estimate`, `fit` (a BAE on any tensor of vectors), `elimination` (features that are not worth their
bits), `synthetic` and `recovery` (known entropies), `dynamics` and `saturation` (by layer and position).
"""
