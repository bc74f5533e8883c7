"""A dictionary trained on cached activations, in SAELens' trainer.

`recipe` (what, and for how long), `trainer` (`train_dictionary`, which goes on after an interruption), `checkpoints`;
`transcoder_runner` is SAELens' multi-SAE runner for transcoders.
"""
