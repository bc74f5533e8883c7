"""What a binary autoencoder is trained with: the coefficients, the rate it is steered to, and named settings."""

import math
from dataclasses import dataclass
from typing import Any, Literal, no_type_check

from sae_lens import TrainingSAEConfig
from typing_extensions import override

from bae_lens.functional.binarize import SURROGATES, Surrogate
from bae_lens.functional.losses import ENTROPY_FORMS, RECONSTRUCTIONS, EntropyForm, Reconstruction, check_tangent
from bae_lens.saes.bae import check_max_flips, check_sizes

Preset = Literal["default", "optimized", "paper", "authors"]
FLIPS = 128  # of a vector at most; fewer pay at a few hundred bits a vector
PER_TOKEN = ("layer_norm", "constant_norm_rescale")  # normalizations after which there is no scale to find


@no_type_check
@dataclass
class TrainingBAEConfig(TrainingSAEConfig):
    """Config of a `TrainingBAE`. Raises ValueError, naming rule and value, for values out of range."""

    apply_b_dec_to_input: bool = False
    """Must be False: the BAE's encoder takes its input as it is (Eq. 1)."""
    decoder_init_norm: float | None = 1.0
    """Norm of the decoder rows at the start; the encoder starts as their transpose."""
    entropy_coefficient: float = 0.3
    """Weight of the marginal entropy in bits (alpha_e of Eq. 5), from `entropy_start_step` on."""
    covariance_coefficient: float = 0.0
    """Weight of the covariance penalty (alpha_c of Eq. 5), from the first step on; 0 leaves it out."""
    covariance_sample: int | None = None
    """Features drawn anew in each step for an unbiased estimate of the penalty; None takes all. See
    `covariance_penalty`."""
    entropy_start_step: int = 0
    """Training step at which the entropy is switched on. `preset` computes it from the length of the run.
    (SAELens saves mid-run checkpoints before it counts the step: a run resumed from one counts one step less.)"""
    target_l0: float | None = None
    """If set, the entropy coefficient is steered, from `entropy_coefficient` on, until so many features fire per token;
    see `rate_control`."""
    target_bits: float | None = None
    """If set, it is steered until the code has so many bits per token (Eq. 4). One of the two targets can be set."""
    tangent_rate: float = 0.03
    """Firing rate from which on a firing costs what it does there, and not less, as the entropy alone would have it;
    1 for the entropy alone. Keeps features from firing on many tokens; see `tangent_entropy`."""
    surrogate: Surrogate = "sigmoid"
    """Gradient through the step (Eq. 6); see `step`."""
    entropy: EntropyForm = "bernoulli"
    """Form of the entropy (Eq. 4); see `marginal_entropy`."""
    reconstruction: Reconstruction = "sum"
    """Convention of the reconstruction loss (Eq. 3); coefficients are relative to it. See `reconstruction_error`."""
    apply_encoder_bias: bool = True
    """False holds the encoder bias at 0, the form of the paper's Eq. 1."""
    encoder_bias_init: float = -2.0
    """Encoder bias at the start, in units of the pre-activation. At 0 half of all features start, and stay, on."""
    max_flips: int = 0
    """Bits of each vector's code that the trained dictionary's `encode` may flip where it pays; see `BAEConfig`."""
    optimized_start_step: int | None = None
    """Training step from which the decoder is trained on codes with up to `max_flips` bits flipped where it pays, and
    the encoder to predict them, by a logistic loss. After `entropy_start_step`, which finds the price of a bit."""
    prior_decay: float = 0.99
    """Decay per step of the running mean `prior`."""
    standardize_activations: bool = True
    """Whether code and losses are those of activations centered and scaled to mean squared norm d_in, so that
    coefficients do not depend on the activations' mean and scale. The scale is found on the first batch, the mean
    follows the batches. What goes in and comes out, and what is saved for inference, is for activations as they are.
    Has no effect where the weights could not absorb it: without encoder bias, in less than float32, and where SAELens
    normalizes every token."""

    @classmethod
    @override
    def architecture(cls) -> str:
        return "bae"

    @classmethod
    @override
    def from_dict(cls, config_dict: dict[str, Any]) -> "TrainingBAEConfig":
        if config_dict.get("surrogate") == "reference":  # what earlier checkpoints call the authors' one
            config_dict = {**config_dict, "surrogate": "authors"}
        return super().from_dict(config_dict)

    @classmethod
    def preset(
        cls, name: Preset, *, d_in: int, d_sae: int, training_steps: int, **overrides: Any
    ) -> "TrainingBAEConfig":
        """Named hyperparameters for a run of `training_steps` optimizer steps; keywords override single fields.

        - `"default"`: ours, for language-model activations scaled to mean squared norm d_in (batch 512, lr 6e-3,
          entropy from 5 % of training).
        - `"optimized"`: the same, and in the last fifth of training, when the learning rate falls, codes with the bits
          flipped that pay; at inference too.
        - `"paper"`: the formulas as published: no encoder bias, sigmoid surrogate, norm loss (batch 512, lr 5e-4,
          entropy from 25 %). The entropy is the Bernoulli form, without which the paper's benchmark does not come out.
        - `"authors"`: the formulas of their code: encoder bias, squashed gradient, mean squared error (same settings).

        The published presets start at SAELens' own initial weights, and train in its trainer, which clips gradients.
        """
        published = {
            "entropy_coefficient": 1e-7,
            "covariance_coefficient": 1e-7,
            "encoder_bias_init": 0.0,
            "decoder_init_norm": None,
            "tangent_rate": 1.0,
            "standardize_activations": False,
        }
        presets: dict[str, tuple[float, dict[str, Any]]] = {
            "default": (0.05, {}),
            "optimized": (0.05, {"max_flips": FLIPS, "optimized_start_step": round(0.8 * training_steps)}),
            "paper": (0.25, {**published, "reconstruction": "l2_norm", "apply_encoder_bias": False}),
            "authors": (0.25, {**published, "reconstruction": "mean", "surrogate": "authors"}),
        }
        if name not in presets:
            raise ValueError(f"preset must be one of {', '.join(presets)}, got {name!r}")
        entropy_from, values = presets[name]
        values = {"entropy_start_step": round(entropy_from * training_steps), **values, **overrides}
        return cls(d_in=d_in, d_sae=d_sae, **values)

    @property
    def standardizes(self) -> bool:
        """Whether a standardization is found, which the weights can absorb when they are saved."""
        exact = self.dtype in ("float32", "float64") and self.normalize_activations not in PER_TOKEN
        return self.standardize_activations and self.apply_encoder_bias and exact

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self)
        check_max_flips(self.max_flips)
        self._check_optimized_start()
        for name in ("entropy_coefficient", "covariance_coefficient", "entropy_start_step"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        for name in ("target_l0", "target_bits"):
            target = getattr(self, name)
            if target is not None and not 0 < target < self.d_sae:
                raise ValueError(f"{name} must lie between 0 and d_sae = {self.d_sae}, got {target}")
            if target is not None and self.entropy_coefficient == 0:
                raise ValueError(f"{name} steers the entropy coefficient, which must then be positive, got 0")
        if self.target_l0 is not None and self.target_bits is not None:
            given = f"{self.target_l0} and {self.target_bits}"
            raise ValueError(f"one rate can be asked for: set target_l0 or target_bits, got {given}")
        check_tangent(self.tangent_rate)
        if self.covariance_sample is not None and not 2 <= self.covariance_sample <= self.d_sae:
            bounds = f"between 2 and d_sae = {self.d_sae}"
            raise ValueError(f"covariance_sample must lie {bounds}, got {self.covariance_sample}")
        if not 0 <= self.prior_decay < 1:
            raise ValueError(f"prior_decay must lie in [0, 1), got {self.prior_decay}")
        if not self.apply_encoder_bias and self.encoder_bias_init != 0:
            raise ValueError(f"encoder_bias_init must be 0 without an encoder bias, got {self.encoder_bias_init}")
        for name, choices in (
            ("surrogate", SURROGATES),
            ("entropy", ENTROPY_FORMS),
            ("reconstruction", RECONSTRUCTIONS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")

    def _check_optimized_start(self) -> None:
        start = self.optimized_start_step
        if start is None:
            return
        if start <= self.entropy_start_step:
            raise ValueError(
                f"optimized_start_step must be after entropy_start_step = {self.entropy_start_step}, from which on a "
                f"bit has a price, got {start}"
            )
        if self.max_flips == 0:
            raise ValueError("codes that are optimized in training must be at inference: set max_flips, such as to 32")
