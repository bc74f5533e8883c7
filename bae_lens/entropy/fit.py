"""Training BAEs on tensors of vectors, without a language model: one, or many at once as one batch of matrices."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor
from tqdm.auto import tqdm

from bae_lens.entropy.elimination import eliminate
from bae_lens.functional.binarize import step
from bae_lens.functional.losses import marginal_entropy
from bae_lens.saes.bae import BAE, BAEConfig
from bae_lens.saes.standardization import Standardization, folded

ENCODED_AT_A_TIME = 8192  # vectors


@dataclass(frozen=True)
class FitSettings:
    """How `fit_bae` trains. One setting serves coins of any number and features of any number (see benchmarks).

    First the reconstruction alone, for a quarter of the steps: with the entropy from the start, dense data end in a
    code that is cheap and wrong. Then with the entropy. Halfway and at the end, `eliminate` drops the features that are
    not worth their bits, which gradients cannot do; what the first one leaves has the second half to settle.
    """

    steps: int = 3072
    """Optimizer steps."""
    batch_size: int = 512
    """Vectors per step."""
    lr: float = 1e-2
    """Learning rate of Adam."""
    lr_decay: float = 0.3
    """Share of the steps, at the end, over which the learning rate falls linearly to 0."""
    entropy_from: float = 0.25
    """Share of the steps after which the entropy counts."""
    encoder_bias: float = 0.0
    """Encoder bias at the start; at 0 every feature begins as a fair coin."""
    elimination: bool = True
    """Whether features that are not worth their bits are dropped."""

    def __post_init__(self) -> None:
        """Raises ValueError for values that no training can have."""
        for name, least in (("steps", 1), ("batch_size", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("lr_decay", "entropy_from"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {self.lr}")
        if not math.isfinite(self.encoder_bias):
            raise ValueError(f"encoder_bias must be finite, got {self.encoder_bias}")


def fit_bae(
    vectors: Num[Tensor, "n d_in"],
    d_sae: int,
    seed: int = 0,
    entropy_coefficient: float = 0.3,
    settings: FitSettings | None = None,
) -> BAE:
    """A BAE trained on the vectors; its `prior` is their mean code. It takes and gives vectors as they come.

    `entropy_coefficient` is what a bit costs in the loss: the squared error, for vectors centered and scaled to mean
    squared norm d_in, that it must save to be worth it. `seed` fixes the initial weights and the order of the vectors.

    Raises ValueError for fewer vectors than a batch, values that are not finite, whole numbers, vectors that are all
    the same, and a coefficient that is negative or not finite.
    """
    return fit_baes(vectors[None], d_sae, seed, [entropy_coefficient], settings)[0]


def fit_baes(
    vectors: Num[Tensor, "models n d_in"],
    d_sae: int,
    seed: int = 0,
    entropy_coefficients: Sequence[float] = (0.3,),
    settings: FitSettings | None = None,
) -> list[BAE]:
    """`fit_bae` for several sets of vectors together, which is faster than one after the other while they are small.

    All begin at the same weights and see their vectors in the same order, as `fit_bae` with this seed would have it.
    There is one entropy coefficient a model, or one for all. Expand the first axis to train on one set with many
    coefficients.
    Raises ValueError as `fit_bae` does, naming the model.
    """
    settings = settings or FitSettings()
    n_models, n, d_in = vectors.shape
    if not vectors.is_floating_point():
        raise ValueError(f"vectors must be floating-point numbers, got {vectors.dtype}; pass vectors.float()")
    if d_sae < 1:
        raise ValueError(f"d_sae must be at least 1, got {d_sae}")
    if n < settings.batch_size:
        raise ValueError(
            f"training needs at least a batch of {settings.batch_size} vectors, got {n}; use a smaller one"
        )
    if len(entropy_coefficients) not in (1, n_models):
        raise ValueError(f"give one entropy coefficient for all or each model, got {entropy_coefficients}")
    check_entropy_coefficients(entropy_coefficients)
    coefficient = torch.tensor(entropy_coefficients, dtype=vectors.dtype, device=vectors.device).expand(n_models)
    mean, scale = _standardization(vectors)
    weights = _Weights(n_models, d_in, d_sae, settings.encoder_bias, seed, vectors)
    weights.train((vectors - mean) * scale, coefficient, settings, torch.Generator().manual_seed(seed))
    standardizations = [Standardization(mean[i, 0], scale[i].item()) for i in range(n_models)]
    return [weights.bae(i, standardizations[i], coefficient[i].item(), vectors[i]) for i in range(n_models)]


def check_entropy_coefficients(entropy_coefficients: Sequence[float]) -> None:
    """Raises ValueError for coefficients that are negative or not finite."""
    if not all(0 <= coefficient < math.inf for coefficient in entropy_coefficients):
        raise ValueError(f"entropy coefficients must be finite and at least 0, got {list(entropy_coefficients)}")


class _Weights:
    """The weights of several BAEs on standardized vectors, the models along the first axis."""

    def __init__(self, n_models: int, d_in: int, d_sae: int, encoder_bias: float, seed: int, like: Tensor) -> None:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator, dtype=like.dtype), dim=1)
        rows = rows.to(like.device).expand(n_models, d_sae, d_in)
        self.W_enc = rows.mT.clone().requires_grad_()
        self.b_enc = like.new_full((n_models, 1, d_sae), encoder_bias).requires_grad_()
        self.W_dec = rows.clone().requires_grad_()
        self.b_dec = like.new_zeros(n_models, 1, d_in).requires_grad_()

    def encode(self, x: Float[Tensor, "models n d_in"]) -> Float[Tensor, "models n d_sae"]:
        return step(x @ self.W_enc + self.b_enc)

    def loss(self, x: Float[Tensor, "models n d_in"], coefficient: Float[Tensor, " models"]) -> Float[Tensor, ""]:
        """Sum over models of the loss (Eq. 5, without the covariance), so that each gets the gradient of its own."""
        code = self.encode(x)
        error = torch.baddbmm(self.b_dec, code, self.W_dec) - x
        return error.square().sum(-1).mean(-1).sum() + coefficient @ marginal_entropy(code.mean(1))

    def train(
        self,
        x: Float[Tensor, "models n d_in"],
        coefficient: Float[Tensor, " models"],
        settings: FitSettings,
        generator: torch.Generator,
    ) -> None:
        optimizer = torch.optim.Adam([self.W_enc, self.b_enc, self.W_dec, self.b_dec], lr=settings.lr, fused=True)
        decay = max(1, round(settings.lr_decay * settings.steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (settings.steps - i) / decay))
        batches = _batches(x.shape[1], settings.batch_size, settings.steps, generator)
        for i, rows in enumerate(tqdm(batches, f"training {len(x)} BAE", settings.steps, unit="step", leave=False)):
            started = i >= settings.entropy_from * settings.steps
            optimizer.zero_grad()
            self.loss(x[:, rows], coefficient * started).backward()
            optimizer.step()
            schedule.step()
            if settings.elimination and i + 1 in (settings.steps // 2, settings.steps):
                self.eliminate(x, coefficient, optimizer)

    @torch.no_grad()
    def eliminate(
        self, x: Float[Tensor, "models n d_in"], coefficient: Float[Tensor, " models"], optimizer: torch.optim.Adam
    ) -> None:
        """Drops features for good: one that never fires and has no decoder row gets no gradient, and no momentum."""
        for i in range(len(x)):
            code = torch.cat([step(rows @ self.W_enc[i] + self.b_enc[i]) for rows in x[i].split(ENCODED_AT_A_TIME)])
            kept, self.W_dec[i], self.b_dec[i] = eliminate(code, x[i], coefficient[i].item())
            self.W_enc[i, :, ~kept] = 0.0
            self.b_enc[i, :, ~kept] = -1.0
            for moment in ("exp_avg", "exp_avg_sq"):
                optimizer.state[self.W_enc][moment][i, :, ~kept] = 0.0
                optimizer.state[self.b_enc][moment][i, :, ~kept] = 0.0
                optimizer.state[self.W_dec][moment][i, ~kept] = 0.0

    @torch.no_grad()
    def bae(
        self, i: int, standardization: Standardization, coefficient: float, vectors: Float[Tensor, "n d_in"]
    ) -> BAE:
        """One model, for raw vectors. Its entropy coefficient becomes the price of a bit in their squared error."""
        d_in, d_sae = self.W_enc[i].shape
        dtype = str(vectors.dtype).removeprefix("torch.")
        bae = BAE(BAEConfig(d_in=d_in, d_sae=d_sae, dtype=dtype, device=str(vectors.device)))
        weights = {"W_enc": self.W_enc[i], "b_enc": self.b_enc[i, 0], "W_dec": self.W_dec[i], "b_dec": self.b_dec[i, 0]}
        for name, raw in folded(weights, standardization, standardization).items():
            getattr(bae, name).copy_(raw)
        bae.bit_price.fill_(coefficient / standardization.scale**2)
        bae.estimate_prior(vectors.split(ENCODED_AT_A_TIME))
        return bae


def _standardization(
    vectors: Float[Tensor, "models n d_in"],
) -> tuple[Float[Tensor, "models 1 d_in"], Float[Tensor, "models 1 1"]]:
    """Mean, and the factor to mean squared norm d_in, of each set of vectors."""
    mean = vectors.mean(1, keepdim=True, dtype=torch.float64).to(vectors)
    square = _mean_square(vectors - mean)
    scale = (vectors.shape[2] / square).sqrt()
    for i, (value, whole) in enumerate(zip(square.tolist(), _mean_square(vectors).tolist(), strict=True)):
        which = "" if len(square) == 1 else f" of model {i}"
        if not value < float("inf"):
            raise ValueError(f"the vectors{which} must be finite, but hold NaN or infinity")
        if not value > 1e-12 * whole:
            raise ValueError(f"the vectors{which} are all the same, so there is nothing to learn from them")
        if not torch.isfinite(scale[i].to(vectors.dtype)):
            raise ValueError(f"the vectors{which} are too small for {vectors.dtype}; multiply them by a number")
    return mean, scale[:, None, None].to(vectors)


def _mean_square(vectors: Float[Tensor, "models n d_in"]) -> Float[Tensor, " models"]:
    """Of the norms, in float64, in which no square of a float32 overflows or vanishes."""
    return torch.linalg.vector_norm(vectors, dim=2, dtype=torch.float64).square().mean(1)


def _batches(n: int, batch_size: int, steps: int, generator: torch.Generator) -> Sequence[Int[Tensor, " batch"]]:
    """Rows for each step: every epoch in a new order, without the incomplete batch at its end."""
    epochs = -(-steps // (n // batch_size))
    order = (torch.randperm(n, generator=generator)[: n - n % batch_size] for _ in range(epochs))
    return [rows for epoch in order for rows in epoch.split(batch_size)][:steps]
