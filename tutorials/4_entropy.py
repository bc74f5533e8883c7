# %% [markdown]
# # 4. Entropy: of data where it is known, and through the layers of a language model
#
# A code of bits can be counted. If feature $j$ fires at a share $p_j$ of the vectors, the code takes at most
#
# $$H = -\sum_j \left[ p_j \log_2 p_j + (1 - p_j) \log_2 (1 - p_j) \right]$$
#
# bits per vector, and a BAE is trained to keep that low (section 3 of the paper). First this is tried on vectors whose
# entropy is known, and then on the activations of a language model, layer by layer and position by position.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from bae_lens import (
    DynamicsSettings,
    FitSettings,
    correlated_coins,
    demo_dataset,
    entropy_dynamics,
    estimate_entropy,
    fit_bae,
    load_demo_model,
    random_directions,
    random_windows,
    recover,
)

folder = Path("runs/tutorial_4")

# %% [markdown]
# ## Coins
#
# The paper's benchmark: toss 16 fair coins, and add up the directions of those that show heads. Such a vector holds 16
# bits, whatever its dimension. `fit_bae` trains on any tensor of vectors, here with far more features than coins, and
# `estimate_entropy` counts on vectors that were not trained on.

# %%
n_train = 13_000
settings = FitSettings(steps=1024)
vectors, coins = random_directions(16_384, rank=16, d=64, generator=torch.Generator().manual_seed(0))
bae = fit_bae(vectors[:n_train], d_sae=64, settings=settings)
estimate = estimate_entropy(bae, vectors[n_train:])
print(f"{estimate.bits:.3f} bits in {estimate.varying_features} features that vary, of {estimate.d_sae}")
print(f"unexplained variance {estimate.fvu:.1g}")

# %% [markdown]
# Two things make this work: a price on bits, and an elimination that drops features not worth theirs, such as a second
# copy of a coin. `recover` repeats the experiment for several numbers of coins, as they are and with both switched off.

# %%
ranks = [2, 8, 32]
recipes = {
    "as it is": recover(ranks, d_sae=64, settings=settings, n_vectors=16_384),
    "no price, no elimination": recover(
        ranks, d_sae=64, entropy_coefficient=0.0, settings=FitSettings(steps=1024, elimination=False), n_vectors=16_384
    ),
}
for name, rows in recipes.items():
    print(f"{name}:", ", ".join(f"{row.bits:.2f} of {row.true_bits:.0f} (FVU {row.fvu:.0e})" for row in rows))

# %%
figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
axes.plot(ranks, ranks, ":", color="gray", label="exact")
for (name, rows), marker in zip(recipes.items(), "os", strict=True):
    axes.plot([row.true_bits for row in rows], [row.bits for row in rows], marker, label=name)
axes.set(xlabel="true entropy (bits)", ylabel="estimated entropy (bits)")
axes.legend()
plt.show()

# %% [markdown]
# ## An upper bound, and how loose
#
# $H$ counts features one by one. Coins that depend on one another hold less than that, and no count of single features
# can see it. Here each of 16 coins is the one before, turned over once in ten times. `joint_bits_bound` subtracts what
# pairs of features share; it is an upper bound, too.

# %%
known = correlated_coins(16_384, rank=16, d=64, generator=torch.Generator().manual_seed(0), flip=0.1)
bae = fit_bae(known.vectors[:n_train], d_sae=64, settings=settings)
estimate = estimate_entropy(bae, known.vectors[n_train:])
print(f"true: {known.joint_bits:.2f} bits together, {known.marginal_bits:.2f} one by one")
print(f"found: at most {estimate.joint_bits_bound:.2f} bits together, {estimate.corrected_bits:.2f} one by one")

# %% [markdown]
# ## Through the layers
#
# Section 3.2 of the paper: take the activations at one layer and one position of many texts, train a BAE on them, and
# ask how many bits they hold. `random_windows` cuts windows from random places of documents, `entropy_dynamics` runs the
# model over them once and trains a BAE for every layer and position. Bits are measured on documents that were held out.

# %%
model, dataset = load_demo_model(), demo_dataset().shuffle(seed=0)
windows = random_windows(model.tokenizer, dataset, length=32, n_windows=512)
layers, positions = [2, 8], [1, 2, 8, 32]
hook_names = [f"blocks.{layer}.hook_resid_post" for layer in layers]
dynamics = entropy_dynamics(model, windows, hook_names, positions, DynamicsSettings(d_sae=288), folder)

print(f"{dynamics.n_windows} windows of {dynamics.n_documents} documents; bits by position (explained variance):")
for hook_name in dynamics.hook_names:
    cells = [
        f"{point.position}: {point.bits:.0f} ({point.explained_variance:.2f})" for point in dynamics.curve(hook_name)
    ]
    print(f"{hook_name}  {'  '.join(cells)}")

# %% [markdown]
# ## How to read it
#
# Bits mean nothing without the explained variance beside them, because a worse code is a shorter one: a curve may be
# flat, or fall, only because activations become harder to explain. Both are drawn.
#
# There is a check at position 1. The hidden state there follows from a single token, so that the windows can hold no
# more than the logarithm of the number of distinct tokens (dashed). What a code takes beyond that, its features spend on
# repeating one another; dotted is the bound after subtracting what pairs share.

# %%
figure, (bits, quality) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
for number, hook_name in enumerate(dynamics.hook_names):
    curve, color = dynamics.curve(hook_name), f"C{number}"
    errors = zip(*((p.bits - p.interval[0], p.interval[1] - p.bits) for p in curve), strict=True)
    bits.errorbar(positions, [p.bits for p in curve], list(errors), fmt="o-", color=color, label=hook_name, capsize=2)
    bits.plot(positions, [p.joint_bits_bound for p in curve], ":", color=color)
    quality.plot(positions, [p.explained_variance for p in curve], "o-", color=color)
bits.plot(positions, torch.tensor(dynamics.distinct_tokens).log2(), "--", color="gray", label="log2 of distinct tokens")
bits.set(xlabel="position", ylabel="entropy (bits)", xscale="log", ylim=(0, None))
quality.set(xlabel="position", ylabel="explained variance", xscale="log", ylim=(0, 1))
for panel in (bits, quality):
    panel.set_xticks(positions, positions)
    panel.minorticks_off()
bits.legend(fontsize="small")
plt.show()

# %% [markdown]
# The paper finds that entropy rises with the position and levels off. Bits that rise by more than their intervals, while
# the explained variance does not, would say so. (Intervals are wide, because windows of a document are alike, and few
# documents are held out.) Where it changes, compare positions at equal distortion: give `DynamicsSettings` several
# `entropy_coefficients`, and ask for `dynamics.curve(hook_name, explained_variance=0.4)`. That takes a BAE for each price,
# and more windows than a tutorial has time for:
#
# ```bash
# bae-lens dynamics --output runs/dynamics --layers 5 15 --entropy-coefficients 1 4 16 --explained-variance 0.4
# ```
#
# `benchmarks/README.md` has what came out of that for some positions, and known entropies that are *not* recovered.
