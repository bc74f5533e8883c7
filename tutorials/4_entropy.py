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
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from IPython.display import Image, Markdown

from bae_lens import (
    DynamicsSettings,
    FitSettings,
    bit_model,
    correlated_coins,
    demo_dataset,
    entropy_dynamics,
    estimate_entropy,
    fit_bae,
    fit_tree,
    load_demo_model,
    position_entropies,
    random_directions,
    random_windows,
    recover,
    write_dynamics,
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
# ## An upper bound, and a tighter one
#
# $H$ counts features one by one. Coins that depend on one another hold less than that, and no count of single features
# can see it. Here each of 16 coins is the one before, turned over once in ten times. `fit_tree` learns which other
# feature says most of each, on the vectors that were trained on, and `joint_bits_bound` is what the code takes then on
# those that were not: an upper bound, too, since coins may depend on more than one other.

# %%
known = correlated_coins(16_384, rank=16, d=64, generator=torch.Generator().manual_seed(0), flip=0.1)
bae = fit_bae(known.vectors[:n_train], d_sae=64, settings=settings)
estimate = estimate_entropy(bae, known.vectors[n_train:], tree=fit_tree(bae, known.vectors[:n_train]))
print(f"true: {known.joint_bits:.2f} bits together, {known.marginal_bits:.2f} one by one")
print(f"found: at most {estimate.joint_bits_bound:.2f} bits together, {estimate.corrected_bits:.2f} one by one")

# %% [markdown]
# ## A language model whose entropy is known
#
# The paper's section 3.2 follows entropy through the positions of a text: it rises, and levels off where a layer sees
# no further back. To know whether a measurement can be trusted, measure what is known. In `bit_model` tokens are words
# of four fair bits, and a layer holds the last 2 or 8 of them, each turned by a rotation once for every token since: so
# it has 4 bits more at each position until its window is full. One BAE is trained for all positions of a layer, or one
# for each; entropies are those of each position in either case.

# %%
positions, sees = [1, 2, 4, 8, 16], [2, 8]
generator = torch.Generator().manual_seed(0)
synthetic = bit_model(n_bits=4, d=64, windows=sees, generator=generator)
tokens = synthetic.tokens(2560, max(positions), generator)
states = torch.stack([torch.stack([synthetic.states(tokens, layer, p) for p in positions]) for layer in (0, 1)])
gentle = FitSettings(steps=1024, batch_size=256, entropy_from=0.05, encoder_bias=-2.0, elimination=False)
print(f"{'true, 8 tokens seen':24}", *(f"{synthetic.joint_bits(1, p):6.1f}" for p in positions))
found = {}
for dictionaries in ("shared", "per position"):
    of_coins = DynamicsSettings(d_sae=96, entropy_coefficients=(0.05,), dictionaries=dictionaries, fit=gentle)
    measured = position_entropies(states, torch.arange(len(tokens)), of_coins)
    found[dictionaries] = [held_out.joint_bits_bound for held_out, _ in measured]
    print(f"{dictionaries:24}", *(f"{bits:6.1f}" for bits in found[dictionaries][len(positions) :]))

# %%
figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
for layer, color in ((0, "C0"), (1, "C1")):
    truth = [synthetic.joint_bits(layer, p) for p in positions]
    axes.plot(positions, truth, color=color, label=f"true, {sees[layer]} tokens seen")
    for dictionaries, marker in (("shared", "o"), ("per position", "x")):
        start = layer * len(positions)
        axes.plot(positions, found[dictionaries][start : start + len(positions)], marker, color=color)
axes.plot([], [], "o", color="gray", label="found, a BAE for all positions")
axes.plot([], [], "x", color="gray", label="found, one for each")
axes.set(xlabel="position", ylabel="joint bits", xscale="log", ylim=(0, None))
axes.set_xticks(positions, positions)
axes.legend()
plt.show()

# %% [markdown]
# ## Through the layers
#
# Now the real one. `random_windows` cuts windows from random places of documents, and `entropy_dynamics` runs the model
# over them once, trains BAEs at several prices of a bit, and measures every layer and position on documents that were
# held out: a curve of bits against explained variance for each.

# %%
model, dataset = load_demo_model(), demo_dataset().shuffle(seed=0)
windows = random_windows(model.tokenizer, dataset, length=32, n_windows=1024)
hook_names = ["blocks.2.hook_resid_post", "blocks.8.hook_resid_post"]
of_model = DynamicsSettings(d_sae=288, fit=replace(gentle, steps=384))
dynamics = entropy_dynamics(model, windows, hook_names, [1, 2, 4, 8, 16, 32], of_model, folder)
table = write_dynamics(dynamics, folder)
Markdown(table)

# %%
Image(folder / "dynamics.png")

# %% [markdown]
# ## How to read it
#
# Bits mean nothing without the explained variance beside them, because a worse code is a shorter one. So the first two
# views compare all cells at one explained variance, and leave out those that do not reach it. The other two are the
# paper's: one low price, nearly lossless codes, all windows measured, and the same on windows held out. A letter on a
# number, or a hollow mark, says that it tells more of the code than of the activations, and why.
#
# There is a check at position 1. The hidden state there follows from a single token, so that it holds no more than the
# logarithm of the number of distinct tokens. Features one by one take more, because they repeat one another; joint bits
# are nearer.
#
# The same for more layers, positions and windows is one command, which also takes a CUDA device:
#
# ```bash
# bae-lens dynamics --output runs/dynamics
# ```
#
# `benchmarks/README.md` has what came out of that, and of known entropies that are *not* recovered.
