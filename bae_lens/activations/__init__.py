"""Model and text to activations: one pass of a language model, kept on disk.

In reading order: `sources` and `demo_model` (models and texts by name), `contexts` (documents cut and split),
`forward` (the run with hooks), `cache` and `paired` (activations on disk, for SAEs and transcoders), `position_cache`
(by position).
"""
