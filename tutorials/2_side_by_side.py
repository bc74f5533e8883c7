# %% [markdown]
# # 2. Side by side: a BAE, ReLU, Top-k and Gated SAEs, and a transcoder
#
# Dictionaries can only be compared on the same activations with the same budget. `compare` runs the model once, trains
# every dictionary on the same tokens in the same order, folds scale and centering into each, and measures all of them on
# documents that none has seen. Contenders are SAELens' own training configs.

# %%
from pathlib import Path

from IPython.display import Image, Markdown, display
from sae_lens import SAE, GatedTrainingSAEConfig, StandardTrainingSAEConfig, TopKTrainingSAEConfig

from bae_lens import (
    Contender,
    ContextSettings,
    Experiment,
    Recipe,
    TrainingBAEConfig,
    TrainingSettings,
    TrainingTopKTranscoderConfig,
    bits_at,
    compare,
    demo_dataset,
    load_demo_model,
    write_pictures,
)

model, dataset = load_demo_model(), demo_dataset()
folder = Path("runs/tutorial_2")

# %% [markdown]
# ## The experiment
#
# What all contenders share: model, text, place, tokens. `l0` is the number of features per token at which they are to be
# compared. BAE and Top-k can be told; ReLU and Gated have a penalty, set to what came near in trials. With several
# `Recipe`s for each contender, `compare` chooses by itself, on documents held out for that.
#
# Contexts of 32 tokens and so few of them are for the sake of time; leave out `context_size`, and take ten times the
# tokens, for results to rely on.

# %%
experiment = Experiment(
    model="smollm2",
    dataset="sotu",
    hook_name="blocks.8.hook_resid_post",
    contexts=ContextSettings(context_size=32, cached_tokens=16_384, held_out_tokens=2048, loss_contexts=16),
    training=TrainingSettings(training_tokens=51_200, batch_size=256),
    l0=32.0,
)
size = {"d_in": 576, "d_sae": 1152}
steps = experiment.training.steps
rate = {"target_l0": 32.0, "entropy_start_step": steps // 4}  # the preset's 5 % are too soon in so short a training
contenders = {
    "BAE": Contender((Recipe(TrainingBAEConfig.preset("default", **size, training_steps=steps, **rate), lr=6e-3),)),
    "ReLU": Contender((Recipe(StandardTrainingSAEConfig(**size, l1_coefficient=4.2), lr=2e-3),)),
    "Top-k": Contender((Recipe(TopKTrainingSAEConfig(**size, k=32), lr=1e-3),)),
    "Gated": Contender((Recipe(GatedTrainingSAEConfig(**size, l1_coefficient=7.0), lr=2e-3),)),
    "Transcoder": Contender(
        (Recipe(TrainingTopKTranscoderConfig(**size, d_out=576, k=32), lr=1e-3),),
        hook_name="blocks.8.mlp.hook_in",
        hook_name_out="blocks.8.hook_mlp_out",
    ),
}
comparison = compare(model, dataset, contenders, experiment, folder)

# %%
display(Markdown(comparison.table()))

# %% [markdown]
# ## How to read it
#
# - **Explained variance** and **CE recovered** say how much of the hidden state, and of what the model does with it,
#   survives. The transcoder's are those of other activations, because it predicts the MLP's output: it cannot be compared.
# - **L0** is features per token. Compare dictionaries only where theirs are near one another.
# - **Support bits** say which features fire. Real-valued features need **value bits** on top: the cheapest quantization
#   that costs at most 0.01 of explained variance. A BAE has no values.
# - **Dead** features never fire on the held-out documents, **dense** ones fire on over 10 % of the tokens.
# - **Feature Activated** (the paper's Table 1) counts features that are among the ten most surprising, or strongest, of at
#   least 8 tokens.
#
# ## Bits against quality
#
# One number per dictionary says little: a worse code is a shorter one. The fair picture is explained variance against
# bits, one panel for each place at which dictionaries write. A dictionary with real values is a curve over coarser and
# finer values, marked where the table counts it; a BAE is a point. PCA with quantized components is what needs no dictionary,
# and nothing could be above the Gaussian bound if activations were Gaussian.

# %%
by_bits, *_, frequencies = write_pictures(comparison, folder)
display(Image(by_bits, width=900))

# %% [markdown]
# What to look for: at equal L0, a dictionary that may choose a strength for every feature can reconstruct more than one
# that may not. The question is what those strengths cost: which mark lies to the left of the others' curves at its own
# height? And a dictionary to the right of PCA has not earned its keep as a code, which after so short a training may be
# all of them. What it may have, and PCA has not, is features to look at.

# %%
for dictionary in comparison.dictionaries:
    point = dictionary.runs[0].metrics.coded  # with its values quantized
    line = f"{dictionary.name:10} {point.bits:4.0f} bits for {point.explained_variance:.3f}"
    if dictionary.hook_name_out == experiment.hook_name:
        line += f", where PCA takes {bits_at(comparison.pca, point.explained_variance):4.0f}"
    print(line)

# %% [markdown]
# How often features fire differs, too, and scores of features should be compared at equal frequency. (Those that fire on
# every other token, at the right, are rarely about anything.)

# %%
display(Image(frequencies, width=500))

# %% [markdown]
# Trained for so short a time and with one seed, this shows how to compare, and not which is best. The README has a
# longer run.
#
# ## What is on disk
#
# Every trained dictionary is an SAE for raw activations, which `SAE.load_from_disk` loads; `result.json` holds all
# numbers, and `saebench` those that SAEBench would report, under its keys. An interrupted comparison goes on where it
# stopped.

# %%
print(sorted(path.name for path in folder.iterdir()))
print(sorted(path.name for path in (folder / "dictionaries").iterdir()))
sae = SAE.load_from_disk(folder / "dictionaries" / "BAE")
print(type(sae).__name__, sae.cfg.metadata.hook_name)

# %% [markdown]
# On the shell, with tuning, seeds, and a report to browse:
#
# ```bash
# bae-lens compare --output runs/side_by_side --l0 32 --trials 3 --seeds 0 1 --architectures bae standard topk gated transcoder
# ```
