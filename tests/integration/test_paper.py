"""The paper's benchmark of known entropy at small scale: random directions switched by fair coins (section 3.1)."""

from collections.abc import Iterator

import pytest
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from bae_lens import TrainingBAE, TrainingBAEConfig, marginal_entropy

pytestmark = pytest.mark.usefixtures("one_thread")

D_IN, D_SAE, STEPS, BATCH = 32, 64, 1000, 256


def coins(rank: int, n: int, seed: int) -> Iterator[torch.Tensor]:
    """Batches of sums of the directions whose coin shows heads; the directions are the same for every seed."""
    orthonormal, _ = torch.linalg.qr(torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(0)))
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(2, (n, rank), generator=generator).float() @ orthonormal[:rank]


def bits_and_unexplained_variance(rank: int, entropy: float, covariance: float) -> tuple[float, float]:
    """Of held-out data, after 1000 steps of Adam at lr 1e-2 with the entropy switched on after a quarter of them."""
    cfg = TrainingBAEConfig(
        d_in=D_IN,
        d_sae=D_SAE,
        encoder_bias_init=-0.5,
        entropy_coefficient=entropy,
        covariance_coefficient=covariance,
        entropy_start_step=STEPS // 4,
        tangent_rate=1.0,
        standardize_activations=False,
    )
    trainer_cfg = SAETrainerConfig(
        total_training_samples=STEPS * BATCH, train_batch_size_samples=BATCH, lr=1e-2, lr_end=1e-2
    )
    sae = SAETrainer(trainer_cfg, TrainingBAE(cfg), coins(rank, BATCH, seed=1)).fit()
    x = next(coins(rank, 8192, seed=2))
    with torch.no_grad():
        code = sae.encode(x)
        unexplained = (sae.decode(code) - x).square().sum() / (x - x.mean(0)).square().sum()
    return marginal_entropy(code.mean(0)).item(), unexplained.item()


@pytest.mark.parametrize("rank", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_r_fair_coins_have_r_bits(rank):
    bits, unexplained_variance = bits_and_unexplained_variance(rank, entropy=1e-2, covariance=1e-3)

    assert bits == pytest.approx(rank, rel=0.02)
    assert unexplained_variance < 1e-2


@pytest.mark.slow
def test_without_the_penalties_the_code_says_everything_several_times():
    bits, unexplained_variance = bits_and_unexplained_variance(rank=4, entropy=0.0, covariance=0.0)

    assert bits > 3 * 4
    assert unexplained_variance < 1e-2
