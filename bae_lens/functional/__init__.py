"""The paper's equations, and what else is computed from tensors alone.

`binarize` (the step, Eq. 2 and 6), `losses` (Eq. 3 and 4), `covariance` (Eq. 5), `sparse_matmul`, `packing`, `strength`
(section 4.1), `rate_control` (the price of a bit), `rate_distortion` (bits against explained variance),
`pair_tree` and `geometric_prior` (bits given other bits).
"""
