"""Model and text, or files of vectors, to activations on disk.

In reading order: `sources` and `demo_model` (models and texts by name), `contexts` (documents cut and split),
`forward` (the run with hooks), `precision` (number formats), `cache` and `paired` (activations on disk, for SAEs and
transcoders), `streaming` (computed when training needs them), `batch_order` (in which training sees them),
`position_cache` (by position). Without a model:
`vector_files`, `vectors` (of files or arrays, and how they are split) and `vector_cache`.
"""
