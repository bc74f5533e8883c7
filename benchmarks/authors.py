"""The formulas of the authors' code, stated plainly: what a step costs without any of our shortcuts."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

LARGEST_D_SAE = 16_384  # beyond, its matrices of d_sae x d_sae numbers, several at a time, do not fit


def covariance_penalty(feature_acts: Float[Tensor, "batch d_sae"]) -> Float[Tensor, ""]:
    """Sum over pairs of |cov|, from the whole covariance matrix (Eq. 5)."""
    covariance = torch.cov(feature_acts.T)
    return covariance.abs().sum() - covariance.diagonal().abs().sum()


class AuthorsBAE(nn.Module):
    """Eq. 1-5 with the conventions of the authors' code and a straight-through gradient."""

    def __init__(self, d_in: int, d_sae: int, bias: float, coefficient: float = 1e-7) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(d_in, d_sae), nn.Linear(d_sae, d_in)
        self.coefficient = coefficient
        with torch.no_grad():
            self.encoder.weight /= self.encoder.weight.norm(dim=1, keepdim=True)
            self.encoder.bias.fill_(bias)

    def loss(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, ""]:
        pre = self.encoder(x)
        code = pre + ((pre > 0).to(pre.dtype) - pre).detach()
        rate = code.mean(0)
        entropy = -(rate * (rate + 1e-10).log2() + (1 - rate) * (1 - rate + 1e-10).log2()).sum()
        error = nn.functional.mse_loss(self.decoder(code), x)
        return error + self.coefficient * (entropy + covariance_penalty(code))
