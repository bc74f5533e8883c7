"""A dictionary trained on cached activations, in SAELens' trainer."""
