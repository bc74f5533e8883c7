"""From text to the tokens that activate each feature, in their sentences."""
