"""Training BAEs on tensors of vectors, without a language model: one, or many at once as one batch of matrices."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor
from tqdm.auto import tqdm

from bae_lens.entropy.elimination import eliminate
from bae_lens.functional.binarize import step
from bae_lens.functional.covariance import covariance_penalty
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
    covariance_coefficient: float = 0.0
    """Weight of the covariance penalty in the loss, from the first step on."""

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
        if not 0 <= self.covariance_coefficient < math.inf:
            raise ValueError(f"covariance_coefficient must be finite and at least 0, got {self.covariance_coefficient}")


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
    There is one entropy coefficient a model, or one for all. On a GPU no step waits for the CPU.
    Raises ValueError as `fit_bae` does, naming the model.
    """
    n_models = len(vectors)
    if len(entropy_coefficients) not in (1, n_models):
        raise ValueError(f"give one entropy coefficient for all or each model, got {entropy_coefficients}")
    coefficients = list(entropy_coefficients) * (n_models // len(entropy_coefficients))
    return _fit(vectors, list(range(n_models)), d_sae, seed, coefficients, settings or FitSettings())


def fit_curves(
    vectors: Num[Tensor, "sets n d_in"],
    d_sae: int,
    seed: int = 0,
    entropy_coefficients: Sequence[float] = (0.3,),
    settings: FitSettings | None = None,
) -> list[list[BAE]]:
    """For each set of vectors a BAE at each entropy coefficient, from nearly lossless to coarse: a curve of bits
    against explained variance. All are trained together as by `fit_baes`. Raises ValueError as it does.
    """
    prices = list(entropy_coefficients)
    sets = [i for i in range(len(vectors)) for _ in prices]
    baes = _fit(vectors, sets, d_sae, seed, prices * len(vectors), settings or FitSettings())
    return [baes[i : i + len(prices)] for i in range(0, len(baes), len(prices))]


def _fit(
    vectors: Num[Tensor, "sets n d_in"],
    sets: list[int],
    d_sae: int,
    seed: int,
    entropy_coefficients: list[float],
    settings: FitSettings,
) -> list[BAE]:
    """A BAE for each of `sets`, the vectors that it is trained on, and its entropy coefficient."""
    n, d_in = vectors.shape[1:]
    if not vectors.is_floating_point():
        raise ValueError(f"vectors must be floating-point numbers, got {vectors.dtype}; pass vectors.float()")
    if d_sae < 1:
        raise ValueError(f"d_sae must be at least 1, got {d_sae}")
    if n < settings.batch_size:
        raise ValueError(
            f"training needs at least a batch of {settings.batch_size} vectors, got {n}; use a smaller one"
        )
    check_entropy_coefficients(entropy_coefficients)
    coefficient = torch.tensor(entropy_coefficients, dtype=vectors.dtype, device=vectors.device)
    mean, scale = _standardization(vectors)
    data = _Standardized(vectors, mean, scale, torch.tensor(sets, device=vectors.device))
    weights = _Weights(len(sets), d_in, d_sae, settings.encoder_bias, seed, vectors)
    weights.train(data, coefficient, settings, torch.Generator().manual_seed(seed))
    standardizations = [Standardization(own[0], factor.item()) for own, factor in zip(mean, scale, strict=True)]
    return [
        weights.bae(i, standardizations[which], price, vectors[which])
        for i, (which, price) in enumerate(zip(sets, entropy_coefficients, strict=True))
    ]


def check_entropy_coefficients(entropy_coefficients: Sequence[float]) -> None:
    """Raises ValueError for coefficients that are negative or not finite."""
    if not all(0 <= coefficient < math.inf for coefficient in entropy_coefficients):
        raise ValueError(f"entropy coefficients must be finite and at least 0, got {list(entropy_coefficients)}")


class _Standardized(NamedTuple):
    """What models are trained on, centered and scaled a batch at a time: several may share one set of vectors."""

    vectors: Float[Tensor, "sets n d_in"]
    mean: Float[Tensor, "sets 1 d_in"]
    scale: Float[Tensor, "sets 1 1"]
    sets: Int[Tensor, " models"]
    """Of each model, which vectors are its own."""

    def batch(self, rows: Int[Tensor, " batch"]) -> Float[Tensor, "models batch d_in"]:
        """The same rows of each model's vectors."""
        return ((self.vectors.index_select(1, rows) - self.mean) * self.scale).index_select(0, self.sets)

    def of_model(self, model: int) -> Float[Tensor, "n d_in"]:
        """All vectors of one model."""
        own = int(self.sets[model])
        return (self.vectors[own] - self.mean[own]) * self.scale[own]


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

    def loss(
        self, x: Float[Tensor, "models n d_in"], coefficient: Float[Tensor, " models"], covariance_coefficient: float
    ) -> Float[Tensor, ""]:
        """Sum over models of the loss (Eq. 5), so that each gets the gradient of its own."""
        code = self.encode(x)
        error = torch.baddbmm(self.b_dec, code, self.W_dec) - x
        loss = error.square().sum(-1).mean(-1).sum() + coefficient @ marginal_entropy(code.mean(1))
        if covariance_coefficient > 0:
            loss = loss + covariance_coefficient * torch.stack([covariance_penalty(own) for own in code]).sum()
        return loss

    def train(
        self,
        data: _Standardized,
        coefficient: Float[Tensor, " models"],
        settings: FitSettings,
        generator: torch.Generator,
    ) -> None:
        """Nothing in a step waits for the device, so that on a GPU its small products follow one another closely."""
        optimizer = torch.optim.Adam([self.W_enc, self.b_enc, self.W_dec, self.b_dec], lr=settings.lr, fused=True)
        decay = max(1, round(settings.lr_decay * settings.steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (settings.steps - i) / decay))
        n, n_models = data.vectors.shape[1], len(coefficient)
        batches = _batches(n, settings.batch_size, settings.steps, generator).to(data.vectors.device)
        for i, rows in enumerate(tqdm(batches, f"training {n_models} BAE", unit="step", leave=False)):
            started = i >= settings.entropy_from * settings.steps
            optimizer.zero_grad()
            self.loss(data.batch(rows), coefficient * started, settings.covariance_coefficient).backward()
            optimizer.step()
            schedule.step()
            if settings.elimination and i + 1 in (settings.steps // 2, settings.steps):
                self.eliminate(data, coefficient, optimizer)

    @torch.no_grad()
    def eliminate(
        self, data: _Standardized, coefficient: Float[Tensor, " models"], optimizer: torch.optim.Adam
    ) -> None:
        """Drops features for good: one that never fires and has no decoder row gets no gradient, and no momentum."""
        for i, price in enumerate(coefficient.tolist()):
            x = data.of_model(i)
            code = torch.cat([step(rows @ self.W_enc[i] + self.b_enc[i]) for rows in x.split(ENCODED_AT_A_TIME)])
            kept, self.W_dec[i], self.b_dec[i] = eliminate(code, x, price)
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
    vectors: Float[Tensor, "sets n d_in"],
) -> tuple[Float[Tensor, "sets 1 d_in"], Float[Tensor, "sets 1 1"]]:
    """Mean, and the factor to mean squared norm d_in, of each set of vectors."""
    mean = torch.stack([x.mean(0, keepdim=True, dtype=torch.float64) for x in vectors]).to(vectors)
    square = torch.stack([_mean_square(x - own) for x, own in zip(vectors, mean, strict=True)])
    whole_square = torch.stack([_mean_square(x) for x in vectors])
    scale = (vectors.shape[2] / square).sqrt()
    for i, (value, whole) in enumerate(zip(square.tolist(), whole_square.tolist(), strict=True)):
        which = "" if len(square) == 1 else f" of model {i}"
        if not value < float("inf"):
            raise ValueError(f"the vectors{which} must be finite, but hold NaN or infinity")
        if not value > 1e-12 * whole:
            raise ValueError(f"the vectors{which} are all the same, so there is nothing to learn from them")
        if not torch.isfinite(scale[i].to(vectors.dtype)):
            raise ValueError(f"the vectors{which} are too small for {vectors.dtype}; multiply them by a number")
    return mean, scale[:, None, None].to(vectors)


def _mean_square(vectors: Float[Tensor, "n d_in"]) -> Float[Tensor, ""]:
    """Of the norms, in float64, in which no square of a float32 overflows or vanishes."""
    return torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64).square().mean()


def _batches(n: int, batch_size: int, steps: int, generator: torch.Generator) -> Int[Tensor, "steps batch"]:
    """Rows for each step: every epoch in a new order, without the incomplete batch at its end."""
    epochs = -(-steps // (n // batch_size))
    order = [torch.randperm(n, generator=generator)[: n - n % batch_size] for _ in range(epochs)]
    return torch.cat(order).view(-1, batch_size)[:steps]
