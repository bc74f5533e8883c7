# %% [markdown]
# # 5. Compress activations, and steer the model by bits
#
# A code of bits can be written to a file in about as many bits as its entropy, and it can be edited: a feature is set,
# cleared or flipped, and nothing has to be said about how strongly.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from bae_lens import (
    ContextSettings,
    Recipe,
    TrainingBAEConfig,
    TrainingSettings,
    cache_activations,
    choose_contexts,
    compress,
    decompress,
    demo_dataset,
    edit,
    load_demo_model,
    logit_effects,
    read_code,
    train_dictionary,
)

model, documents = load_demo_model(), demo_dataset().shuffle(seed=0)
hook_name = "blocks.8.hook_resid_post"
folder = Path("runs/tutorial_5")

# %% [markdown]
# A BAE, trained as in the first tutorial:

# %%
contexts = choose_contexts(model.tokenizer, documents, ContextSettings(cached_tokens=16_384, held_out_tokens=4096))
train, test = (
    cache_activations(model, contexts[split], [hook_name], folder / split)[hook_name] for split in ("train", "test")
)
training = TrainingSettings(training_tokens=65_536, batch_size=256)
cfg = TrainingBAEConfig.preset("default", d_in=train.d_in, d_sae=1152, training_steps=training.steps, target_l0=32.0)
bae = train_dictionary("bae", Recipe(cfg, lr=6e-3), train, training, folder).sae

# %% [markdown]
# ## Compress
#
# `compress` takes a tensor, a `.npy`, `.pt` or `.safetensors` file, or batches, and writes a `.bae` file. The code in it is
# exact; what is lost is what the dictionary does not reconstruct, and the report says how much that is.

# %%
report = compress(bae, test.batches(2048), folder / "states.bae")
print(f"{report.n_vectors} vectors: {report.bits:.1f} bits each, {report.entropy_bits:.1f} of them entropy")
print(f"float16 would take {16 * report.d_in} bits; explained variance {report.explained_variance:.3f}")

# %% [markdown]
# `decompress` gives the reconstructions, `read_code` the code itself, and both read only the rows they are asked for.
# Bits are coded given what other features decode to, so reading them takes the dictionary as well.

# %%
states = test.rows(test.content)
code = read_code(folder / "states.bae", slice(0, 128), sae=bae)
print("code is exact:", torch.equal(code, bae.encode(states[:128])))
back = decompress(folder / "states.bae", bae, slice(0, 128))
print("reconstruction is its decoding:", torch.allclose(back, bae.decode(code), atol=1e-4))

# %%
figure, axes = plt.subplots(figsize=(10, 3), layout="constrained")
often = code.mean(0).argsort(descending=True)[:400]
axes.imshow(code[:, often], aspect="auto", cmap="binary", interpolation="nearest")
axes.set(xlabel="features, those that fire most often first", ylabel="token", title="the code of 128 tokens")
plt.show()

# %% [markdown]
# A dark line would be a token with far more bits than the rest. Whether such a token has an unusual norm, short of the
# outlier ones that are left out, is easily seen:

# %%
norms = states.norm(dim=1) / states.norm(dim=1).median()
for token in code.sum(1).topk(3).indices.tolist():
    print(f"token {token}: {code[token].sum():.0f} bits on, norm {norms[token]:.1f} times the median")

# %% [markdown]
# A list of the features that are on would take the logarithm of their number for each; entropy coding makes use of how
# often each is. Whether that is little for its explained variance is another question: tutorial 2 draws PCA with
# quantized components, which needs no dictionary, into the same picture as dictionaries.

# %%
listed = code.sum(1).mean() * torch.tensor(float(report.d_sae)).log2()
print(f"as a list: {listed:.0f} bits, as plain bits: {report.d_sae}, in the file: {report.bits:.1f}")

# %% [markdown]
# ## What do features make the model say?
#
# `logit_effects` follows a feature's decoder row on the direct path to the logits, and lists the tokens that it raises
# and lowers most. Shown are the most surprising features of some tokens of a sentence (tutorial 1 says what that means).
# In early layers the direct path says little, because most of what a feature does goes through later layers.

# %%
bae.estimate_prior(test.batches(2048))
bae.fold_polarity()

text = "We will defend the freedom of our people"
tokens = model.to_str_tokens(text)
_, cache = model.run_with_cache_with_saes(text, saes=[bae])
activated = bae.activated_features(cache[f"{hook_name}.hook_sae_input"], k=5)[0].tolist()
for token, features in zip(tokens[1:], activated[1:], strict=True):
    (effects,) = logit_effects(model, bae, features[:1], k=5)
    up, down = ([word for word, _ in side] for side in (effects.up, effects.down))
    print(f"{token!r:10} feature {effects.feature:4} raises {up}, lowers {down}")

# %% [markdown]
# ## What does the model need them for?
#
# Inside `edit`, features have other values in every pass of the model: 1 sets a bit, 0 clears it, `"flip"` turns it over.
# The stream changes only by what the edit changes in the BAE's output. An edit without effect leaves the model exactly
# as it was, and the BAE's error stays where it is.
#
# Here the five most surprising bits of one token after another are cleared, and the picture shows how far the model's
# predictions move.

# %%
with torch.no_grad():
    clean = model(text).log_softmax(-1)
    moved = []
    for features in activated[1:]:
        with edit(model, bae, {feature: 0 for feature in features if feature >= 0}):
            edited = model(text).log_softmax(-1)
        moved.append((clean.exp() * (clean - edited)).sum(-1)[0])

# %%
figure, axes = plt.subplots(figsize=(6, 4.5), layout="constrained")
image = axes.imshow(torch.stack(moved), cmap="viridis")
axes.set_xticks(range(len(tokens)), tokens, rotation=45, ha="right")
axes.set_yticks(range(len(tokens) - 1), tokens[1:])
axes.set(xlabel="prediction after", ylabel="without the five bits of")
figure.colorbar(image, label="KL divergence (nats)")
plt.show()

# %% [markdown]
# Features are cleared at all positions, but most are on at one token only, so that predictions move after it and not
# before; a feature that several tokens have moves more of them.
#
# ## Steer
#
# `edit` holds while the model generates, too. Some of the bits of a sentence are set at every position of another, few
# at first, then more; greedy sampling makes the difference plain.

# %%
prompt = "This morning I went to the"
source = activated[tokens.index(" freedom")]
for n in (0, 1, 3, 5):
    with edit(model, bae, {feature: 1 for feature in source[:n] if feature >= 0}):
        continuation = model.generate(prompt, max_new_tokens=16, do_sample=False, verbose=False)
    print(f"{n} bits set: {continuation!r}")

# %% [markdown]
# One bit among all those of a token is a gentle push, and often changes nothing; many bits at every position are one
# that the model has never seen, and it may begin to stutter. Bits have no strength to turn up: what can be chosen is
# which of them, and where (`positions=slice(...)`). Of dictionaries with real values, `edit` sets activations instead.
