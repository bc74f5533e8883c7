"""A dictionary on a model.

`metrics` and `value_bits` need activations only; `model_loss`, `evals` (SAELens' `run_evals`, right for transcoders),
`features` (what makes them fire) and `steering` (what they make the model say) need the model.
"""
