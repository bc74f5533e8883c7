"""Whoever explains features and judges explanations: language models on a server, sentence embeddings; their test."""
