"""Every function of tensors on the shadow device, forward and backward, with the CPU's numbers."""

import inspect
from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils import _pytree as pytree

import bae_lens.functional
from bae_lens.functional import (
    binarize,
    covariance,
    explained_variance,
    geometric_prior,
    losses,
    nonnegative_code,
    optimized_code,
    outliers,
    packing,
    rate_control,
    rate_distortion,
    sparse_matmul,
    strength,
    tree_entropy,
)

N, D, D_SAE = 48, 12, 40


def made(device: str) -> dict[str, Tensor]:
    """Tensors of a dictionary and what it encodes, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    x, other = (torch.randn(N, D, generator=generator) for _ in range(2))
    W_dec = torch.randn(D_SAE, D, generator=generator)
    code = (torch.rand(N, D_SAE, generator=generator) < 0.2).float()
    tensors = {
        "x": x,
        "other": other,
        "W_dec": W_dec,
        "W_enc": W_dec.T.contiguous(),
        "pre": x @ W_dec.T,
        "code": code,
        "rate": code.mean(0),
        "prior": 0.5 * code.mean(0) + 0.1,
        "cost": torch.rand(D_SAE, generator=generator),
        "number": torch.tensor(0.7),
        "eigenvalues": x.var(0).double(),
        "shares": torch.tensor([0.2, 0.9], dtype=torch.float64),
        "counts": torch.randint(0, 6, (N,), generator=generator),
        "activated": torch.randint(-1, D_SAE, (N, 5), generator=generator),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def explained(t: dict[str, Tensor]) -> list[float]:
    measured = explained_variance.ExplainedVariance()
    for rows in (slice(0, 20), slice(20, None)):
        measured.add(t["x"][rows], t["x"][rows] + 0.1 * t["other"][rows])
    return [measured.explained, measured.variance, measured.squares]


def flipped(t: dict[str, Tensor]) -> list[Tensor]:
    weights = [t[name].clone() for name in ("W_enc", "cost", "W_dec", "number", "prior")]
    weights[3] = weights[3].expand(D).clone()
    strength.flip_polarity((t["prior"] > 0.2).float(), *weights)
    return weights


def kept(t: dict[str, Tensor]) -> list[Tensor | None]:
    couplings = optimized_code.KeptCouplings()
    return [couplings(t["W_dec"], n) for n in (N, N, 1)]


def along_a_tree(t: dict[str, Tensor]) -> list[Any]:
    counts = tree_entropy.PairCounts(t["code"])
    counts.add(t["code"])
    tree = tree_entropy.learn_tree(counts)
    return [tree.parents, tree.rate, tree.rate_given, tree.bits(t["code"]), tree.mean_bits(counts)]


CALLS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "step": lambda t: [binarize.step(t["pre"], surrogate) for surrogate in ("sigmoid", "straight_through", "authors")],
    "step_of_largest": lambda t: binarize.step_of_largest(t["pre"], 4),
    "code_times_signs": lambda t: [covariance.code_times_signs(t["code"], part, 2) for part in (0, 1)],
    "others_times_signs": lambda t: covariance.others_times_signs(t["code"][:, :25], t["code"][:, 25:]),
    "absolute_covariance": lambda t: covariance.absolute_covariance(t["code"], covariance.code_times_signs),
    "covariance_penalty": lambda t: [
        covariance.covariance_penalty(t["code"]),
        covariance.covariance_penalty(t["pre"]),
        covariance.covariance_penalty(t["code"], 10, torch.Generator().manual_seed(0)),
    ],
    "ExplainedVariance": explained,
    "geometric_bits": lambda t: tuple(geometric_prior.geometric_bits(t["code"], t["W_enc"], t["W_dec"])),
    "fit_prior": lambda t: geometric_prior.fit_prior(t["pre"], t["code"] > 0),
    "rounded_weight": lambda t: geometric_prior.rounded_weight(t["cost"]),
    "rounded_bias": lambda t: geometric_prior.rounded_bias(t["cost"]),
    "reconstruction_error": lambda t: [
        losses.reconstruction_error(t["x"], t["other"], convention) for convention in ("sum", "mean", "l2_norm")
    ],
    "bit_price": lambda t: [
        losses.bit_price(t["number"], t["number"], D, convention) for convention in ("sum", "mean", "l2_norm")
    ],
    "marginal_entropy": lambda t: [losses.marginal_entropy(t["rate"], form) for form in ("bernoulli", "printed")],
    "tangent_entropy": lambda t: losses.tangent_entropy(t["rate"], 0.03),
    "fit_values": lambda t: nonnegative_code.fit_values(t["x"], t["code"] > 0, t["W_dec"]),
    "pursue": lambda t: nonnegative_code.pursue(t["x"], t["counts"], t["W_dec"]),
    "firing_bits": lambda t: optimized_code.firing_bits(t["prior"]),
    "rate_distortion": lambda t: optimized_code.rate_distortion(t["x"], t["code"], t["W_dec"], t["cost"]),
    "fields": lambda t: optimized_code.fields(t["x"], t["code"], t["W_dec"], t["cost"]),
    "couplings": lambda t: optimized_code.couplings(t["W_dec"]),
    "useful_couplings": lambda t: optimized_code.useful_couplings(t["W_dec"], N),
    "KeptCouplings": kept,
    "optimize_code": lambda t: [
        optimized_code.optimize_code(t["x"], t["code"], t["W_dec"], t["cost"], flips, coupling)
        for flips, coupling in ((None, None), (3, optimized_code.couplings(t["W_dec"])))
    ],
    "check_finite": lambda t: optimized_code.check_finite(t["x"]),
    "argmax_of_rows": lambda t: optimized_code.argmax_of_rows(t["pre"]),
    "is_outlier": lambda t: [outliers.is_outlier(t["x"].abs(), t["number"]), outliers.is_outlier(t["x"].abs(), 0.5)],
    "pack_code": lambda t: packing.pack_code(t["code"]),
    "unpack_code": lambda t: packing.unpack_code(packing.pack_code(t["code"]).to(t["code"].device), D_SAE),
    "excess_l0": lambda t: rate_control.excess_l0(t["rate"], 7.0),
    "excess_bits": lambda t: rate_control.excess_bits(t["rate"], t["prior"], 20.0),
    "excess": lambda t: [
        rate_control.excess(t["rate"], t["prior"], l0, bits) for l0, bits in ((7.0, None), (None, 20.0), (None, None))
    ],
    "controlled_coefficient": lambda t: rate_control.controlled_coefficient(t["number"], t["number"]),
    "updated_multiplier": lambda t: rate_control.updated_multiplier(t["number"], t["number"]),
    "gaussian_bound": lambda t: rate_distortion.gaussian_bound(t["eigenvalues"], 10 * t["shares"]),
    "gaussian_bits": lambda t: rate_distortion.gaussian_bits(t["eigenvalues"], t["shares"]),
    "water_level": lambda t: rate_distortion.water_level(t["eigenvalues"], t["shares"]),
    "pca_quantization": lambda t: [
        tuple(point) for point in rate_distortion.pca_quantization(t["x"], t["other"], (0.3, 0.8))
    ],
    "random_coding": lambda t: [tuple(p) for p in rate_distortion.random_coding(t["x"], t["other"], 8, [1, 3])],
    "sign_coding": lambda t: [tuple(point) for point in rate_distortion.sign_coding(t["x"], t["other"])],
    "covariance": lambda t: rate_distortion.covariance(t["x"]),
    "sparse_matmul": lambda t: sparse_matmul.sparse_matmul(t["code"], t["W_dec"]),
    "firing_rate": lambda t: strength.firing_rate(t["code"]),
    "activation_strength": lambda t: strength.activation_strength(t["code"], t["prior"]),
    "rescaled_activations": lambda t: strength.rescaled_activations(t["pre"].relu(), t["prior"], t["rate"]),
    "strongest_features": lambda t: strength.strongest_features(
        strength.activation_strength(t["code"] + t["pre"].sigmoid() / 8, t["prior"]), 3
    ),
    "count_instances": lambda t: strength.count_instances(t["activated"], D_SAE),
    "flip_polarity": flipped,
    "learn_tree": along_a_tree,
    "PairCounts": along_a_tree,
    "PairTree": along_a_tree,
}
NUMBERS_ALONE = {
    "check_tangent",
    "drawn_features",
    "running_mean_weight",
    "bits_at",
    "weights_at",
    "RatePoint",
    "GeometricBits",
}
OF_ARRAYS = {"bernoulli_bits", "conditional_bits", "spanning_forest", "pair_tree", "pair_bits"}
OF_THE_CPU = {"sums_rows", "NonzeroEntries", "SparseProducts"}  # asked whether the CPU's shortcuts apply, or these
GRADIENTS = {
    "step": ["pre"],
    "step_of_largest": ["pre"],
    "absolute_covariance": ["code"],
    "covariance_penalty": ["code", "pre"],
    "reconstruction_error": ["x"],
    "marginal_entropy": ["rate"],
    "tangent_entropy": ["rate"],
    "sparse_matmul": ["code", "W_dec"],
    "firing_rate": ["code"],
    "excess_bits": ["rate"],
}


def test_every_function_is_called_here():
    names = set()
    for module in iter_modules(bae_lens.functional.__path__):
        loaded = import_module(f"bae_lens.functional.{module.name}")
        names |= {
            name
            for name, value in vars(loaded).items()
            if not name.startswith("_")
            and (inspect.isfunction(value) or inspect.isclass(value))
            and value.__module__ == loaded.__name__
        }
    assert names == CALLS.keys() | NUMBERS_ALONE | OF_ARRAYS | OF_THE_CPU


@pytest.mark.parametrize("name", CALLS)
def test_it_gives_the_numbers_of_the_cpu(name, shadow):
    expected, found = (pytree.tree_leaves(CALLS[name](made(device))) for device in ("cpu", shadow))
    assert len(expected) == len(found)
    for one, other in zip(expected, found, strict=True):
        if isinstance(one, Tensor):
            assert_close(other.cpu(), one, rtol=1e-5, atol=1e-5)
        elif one is not None:
            assert other == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize("name", GRADIENTS)
def test_its_gradients_are_those_of_the_cpu(name, shadow):
    gradients = []
    for device in ("cpu", shadow):
        tensors = made(device)
        for of in GRADIENTS[name]:
            tensors[of].requires_grad_()
        results = pytree.tree_leaves(CALLS[name](tensors))
        total = sum(
            ((i + 1) * result.sin().sum() for i, result in enumerate(results)), start=torch.zeros((), device=device)
        )
        total.backward()
        gradients.append([tensors[of].grad for of in GRADIENTS[name]])
    for one, other in zip(*gradients, strict=True):
        assert other.device.type == shadow
        assert_close(other.cpu(), one, rtol=1e-5, atol=1e-6)
