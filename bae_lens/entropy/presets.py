"""The paper's own settings of the entropy of a language model (section 3.2)."""

from bae_lens.entropy.dynamics import DynamicsSettings
from bae_lens.entropy.fit import FitSettings

PAPER_COEFFICIENT = 1e-7  # of the entropy, in bits, and of the covariance, in a squared error averaged over dimensions
PAPER_EXPANSION = 4  # features per dimension
PAPER_EPOCHS = 200  # of all windows, in steps; a fifth is held out here, which the paper did not do
PAPER_BATCH = 512
PAPER_WINDOWS = 262_144
PAPER_MAX_POSITION = 1024


def paper_settings(
    d_in: int, n_windows: int = PAPER_WINDOWS, batch_size: int = PAPER_BATCH, seed: int = 0
) -> DynamicsSettings:
    """A BAE of 4 features per dimension for each hook and position, the entropy from a quarter of the steps on.

    There are as many steps as 200 epochs of all windows take; a fifth is held out, which the paper did not do. Adam at
    5e-4, the covariance penalty on. The weights of both penalties are the authors' 1e-7, times `d_in` because
    squared errors are summed here and averaged there: the same for activations of unit variance, to which ours are
    scaled.
    """
    fit = FitSettings(
        steps=PAPER_EPOCHS * max(1, n_windows // batch_size),
        batch_size=batch_size,
        lr=5e-4,
        lr_decay=0.0,
        entropy_from=0.25,
        elimination=False,
        covariance_coefficient=PAPER_COEFFICIENT * d_in,
    )
    prices = (PAPER_COEFFICIENT * d_in,)
    return DynamicsSettings(PAPER_EXPANSION * d_in, prices, dictionaries="per position", fit=fit, seed=seed)
