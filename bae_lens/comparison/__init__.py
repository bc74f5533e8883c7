"""Dictionaries side by side: the same activations, the same budget (Table 1).

In reading order: `experiment` (what all share), `dictionaries` (from a few words), `config_file`, `origin` (a model, or
none), `run` (`compare`), `comparing` (what happens in it), `baselines`, `results`; `hooks` (several hooks in one run)
and `hook_results`; `vectors` (without a model); `plan` and `timing` (before anything runs).
"""
