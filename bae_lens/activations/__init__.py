"""Model and text to activations: one pass of a language model, kept on disk.

In reading order: `sources` and `demo_model` (models and texts by name), `contexts` (documents cut and split),
`forward` (the run with hooks), `precision` (number formats), `cache` and `paired` (activations on disk, for SAEs and
transcoders), `batch_order` (in which training sees them), `position_cache` (by position).
"""
