"""The entropy of sets of activations (section 3): known entropies, and a language model's by layer and position."""
