"""A dictionary on a model: metrics, the model's loss, features, steering."""
