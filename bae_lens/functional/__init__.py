"""The paper's equations, and what else is computed from tensors alone."""
