"""Model and text to activations: one pass of a language model, kept on disk."""
