# %% [markdown]
# # 2. Side by side: a BAE, ReLU, Top-k and Gated SAEs, and a transcoder
#
# Dictionaries can only be compared on the same activations with the same budget. `compare` runs the model once, trains
# every dictionary on the same tokens in the same order, folds scale and centring into each, and measures all of them on
# documents that none has seen. Contenders are SAELens' own training configs.

# %%
from pathlib import Path

from IPython.display import Image, Markdown, display
from sae_lens import GatedTrainingSAEConfig, StandardTrainingSAEConfig, TopKTrainingSAEConfig

from bae_lens import (
    Contender,
    Experiment,
    Recipe,
    TrainingBAEConfig,
    TrainingSettings,
    TrainingTopKTranscoderConfig,
    compare,
)
from bae_lens.contexts import ContextSettings
from bae_lens.demo_model import demo_dataset, load_demo_model
from bae_lens.pictures import write_pictures

model, dataset = load_demo_model(), demo_dataset()
folder = Path("runs/tutorial_2")

# %% [markdown]
# ## The experiment
#
# What all contenders share: model, text, place, tokens. `l0` is the number of features per token at which they are to be
# compared. BAE and Top-k can be told; ReLU and Gated have a penalty, which was found beforehand to come near it. With
# several `Recipe`s per contender, `compare` chooses by itself, on documents held out for that.

# %%
experiment = Experiment(
    model="smollm2",
    text="sotu",
    hook_name="blocks.10.hook_resid_post",
    contexts=ContextSettings(harvest_tokens=16_384, held_out_tokens=4096),
    training=TrainingSettings(training_tokens=65_536),
    l0=32.0,
)
size = {"d_in": 576, "d_sae": 1152}
steps = experiment.training.steps
contenders = {
    "BAE": Contender(
        (Recipe(TrainingBAEConfig.preset("default", **size, training_steps=steps, target_l0=32.0), lr=4e-3),)
    ),
    "ReLU": Contender((Recipe(StandardTrainingSAEConfig(**size, l1_coefficient=2.8), lr=1e-3),)),
    "Top-k": Contender((Recipe(TopKTrainingSAEConfig(**size, k=32), lr=1e-3),)),
    "Gated": Contender((Recipe(GatedTrainingSAEConfig(**size, l1_coefficient=4.4), lr=1e-3),)),
    "Transcoder": Contender(
        (Recipe(TrainingTopKTranscoderConfig(**size, d_out=576, k=32), lr=1e-3),),
        hook_in="blocks.10.mlp.hook_in",
        hook_out="blocks.10.hook_mlp_out",
    ),
}
comparison = compare(model, dataset, contenders, experiment, folder)
display(Markdown(comparison.table()))

# %% [markdown]
# ## How to read it
#
# - **Explained variance** and **CE recovered** say how much of the hidden state, and of what the model does with it,
#   survives. The transcoder's are those of other activations: it predicts the MLP's output.
# - **Bits** are what a code takes: *support bits* for which features fire, and for real-valued features *value bits*, the
#   cheapest quantisation that costs at most 0.01 of explained variance. A BAE has no values.
# - **Feature Activated** (the paper's Table 1) counts features that are among the ten most surprising of at least 8 tokens.
# - **Dense** features fire on over 10 % of tokens.
#
# One point per dictionary says little: a worse code is a shorter one. The curve of explained variance against bits is
# the fair picture, with PCA plus quantisation as a reference that needs no dictionary.

# %%
for picture in write_pictures(comparison, folder):
    display(Image(picture, width=800))

# %% [markdown]
# ## What each spends
#
# Every trained dictionary is an SAE on disk, under `dictionaries/`, for raw hidden states. The result has all numbers.

# %%
for dictionary in comparison.dictionaries:
    metrics = dictionary.runs[0].metrics
    bits = metrics.code.support_bits + metrics.value_bits
    print(f"{dictionary.name:10} {bits:5.0f} bits for {metrics.explained_variance:.3f} at {dictionary.hook_out}")
print(sorted(path.name for path in (folder / "dictionaries").iterdir()))

# %% [markdown]
# The command line does the same, with tuning, seeds, and a report to browse:
#
# ```bash
# bae-lens compare --output runs/side_by_side --l0 32 --trials 3 --seeds 0 1 --architectures bae standard topk gated transcoder
# ```
