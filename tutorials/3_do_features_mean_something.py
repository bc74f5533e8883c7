# %% [markdown]
# # 3. Do the features mean something? ComSem scores
#
# ComSem (section 4.2 of the paper) takes a feature, explains what five of its tokens have in common, and asks a judge of
# other tokens that activate it whether the explanation fits them. The score is the share of yes. Here a BAE and a Top-k
# SAE are scored by a judge that needs neither server nor key; at the end stands what to change for a language model.
#
# This needs `pip install "bae-lens[demo,offline-judge]"`.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
from IPython.display import Markdown, display
from sae_lens import TopKTrainingSAEConfig

from bae_lens import (
    AnswerCache,
    ChatClient,
    ComSem,
    ContextSettings,
    CorpusSettings,
    LanguageModelJudge,
    OfflineJudge,
    Price,
    Recipe,
    TrainingBAEConfig,
    TrainingSettings,
    cache_activations,
    choose_contexts,
    demo_dataset,
    load_demo_model,
    train_dictionary,
)
from bae_lens.activations.contexts import HELD_OUT_EVERY

model, documents = load_demo_model(), demo_dataset().shuffle(seed=0)
hook_name = "blocks.8.hook_resid_post"
folder = Path("runs/tutorial_3")

# %% [markdown]
# ## Two dictionaries
#
# They are trained as in the first tutorial, on the same tokens in the same order, with the same number of features per
# token. ComSem takes any SAELens dictionary: SAE objects, folders, or names of SAEs on the hub.

# %%
contexts = choose_contexts(model.tokenizer, documents, ContextSettings(cached_tokens=16_384, held_out_tokens=1024))
train = cache_activations(model, contexts["train"], [hook_name], folder)[hook_name]
training = TrainingSettings(training_tokens=65_536, batch_size=256)
size = {"d_in": train.d_in, "d_sae": 1152}
recipes = {
    "BAE": Recipe(TrainingBAEConfig.preset("default", **size, training_steps=training.steps, target_l0=32.0), lr=6e-3),
    "Top-k": Recipe(TopKTrainingSAEConfig(**size, k=32), lr=1e-3),
}
saes = {name: train_dictionary(name, recipe, train, training, folder).sae for name, recipe in recipes.items()}

# %% [markdown]
# ## Scores
#
# Tokens come from documents that were held out. `OfflineJudge` explains a feature by the property (part of speech, place,
# neighbors, form) or else by the words that set its tokens apart from ordinary ones. It looks up whether a token has a
# property, and says yes to a meaning that is nearer to it, among sentence embeddings, than to nine tenths of ordinary
# tokens.

# %%
held_out = documents.select(range(0, len(documents), HELD_OUT_EVERY))
corpus = CorpusSettings(tokens=10_240)
comsem = ComSem(OfflineJudge(), corpus=corpus, max_features=32, scores=())
report = comsem.score(model, saes, held_out)
display(Markdown(report.table()))

# %% [markdown]
# ## How to read it
#
# - **Feature Activated** is the number of features that are among the ten strongest of at least 8 tokens; **scored** says
#   how many of them were drawn to be scored.
# - **Mean score**, **score > 0** and **score = 1** are the paper's: yes on tokens that activate the feature. Alone they
#   say little, because a vague explanation ("a word") fits everything.
# - **Specificity** is the share of no on matched tokens that do *not* activate the feature; **balanced accuracy** is the
#   mean of it and the score, and 1/2 is chance; **AUC** needs no threshold.
# - **Shuffled** is the score with another feature's explanation, and **random tokens** are scored in a feature's place:
#   what a score would be if features meant nothing.
# - **Detection** and **fuzzing**, two scores about whole passages, were left out (`scores=()`) to save time.
# - The **matched** columns weigh features as if both dictionaries' fired equally often, because rare features are easier
#   to explain.
#
# Below the table stands how the judge did on cases with known answers. A judge that fails is marked † wherever its scores
# are shown: differences may then be the judge's. This one passes, but it knows a few dozen properties and explains by
# one at a time: a low score is no proof that a feature means nothing.
#
# The next picture shows the score beside its controls. It is the distance between them that counts. (Random tokens are
# not asked about with another's explanation.)

# %%
groups = {dictionary.name: dictionary.features for dictionary in report.dictionaries}
groups["random tokens"] = report.random_features
bars = {
    "score: yes where it fires": lambda feature: feature.score,
    "yes where it does not": lambda feature: None if feature.specificity is None else 1 - feature.specificity,
    "yes with another's explanation": lambda feature: feature.shuffled,
}
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
for offset, (name, measure) in enumerate(bars.items()):
    values = [[value for value in map(measure, features) if value is not None] for features in groups.values()]
    heights = [sum(value) / len(value) if value else 0.0 for value in values]
    axes.bar([place + 0.27 * offset for place in range(len(groups))], heights, width=0.25, label=name)
axes.set_xticks([place + 0.27 for place in range(len(groups))], [name + report.mark for name in groups])
axes.set(ylabel="share of yes", ylim=(0, 1))
axes.legend(fontsize="small")
plt.show()

# %% [markdown]
# ## Single features
#
# Every number can be traced to sentences. Here are some of the BAE's features, from the best to the worst score: the
# explanation, and held-out tokens in their sentences with the judge's answer.

# %%
scored = [feature for feature in report.dictionaries[0].features if feature.score is not None and feature.controls]
scored.sort(key=lambda feature: -feature.score)
for feature in scored[:: len(scored) // 5]:
    print(f"\nfeature {feature.feature}, score {feature.score:.2f}, specificity {feature.specificity:.2f}")
    print(f"    explained as: {feature.explanation}")
    for judged in feature.held_out[:3]:
        before, _, after = judged.instance.marked.replace("\n", " ").partition("<<")
        print(f"    {'yes' if judged.verdict.yes else 'no':3} ...{before[-40:]}<<{after[:40]}...")

# %% [markdown]
# ## A language model as judge
#
# Any server that speaks the OpenAI protocol will do. `ChatClient` keeps every answer in a file, so that nothing is asked
# twice; `LanguageModelJudge` names the model. `estimate` collects what `score` would ask, and counts it without asking:
# look there first. Prices are per million tokens, and yours to look up.

# %%
client = ChatClient(cache=AnswerCache(folder / "answers.sqlite"), prices={"gpt-4.1-mini": Price(input=0.4, output=1.6)})
judge = LanguageModelJudge("gpt-4.1-mini", client)
tally = ComSem(judge, corpus=corpus, max_features=32).estimate(model, saes, held_out)
print(tally.estimate)

# %% [markdown]
# With a key in the environment variable `OPENAI_API_KEY`, the next step would be `score` in the place of `estimate`. For
# a server of your own, give its address:
#
# ```python
# client = ChatClient(base_url="http://127.0.0.1:8000/v1", cache=AnswerCache(folder / "answers.sqlite"), concurrency=4)
# judge = LanguageModelJudge("your-model", client)
# report = ComSem(judge, corpus=corpus, max_features=32).score(model, saes, held_out)
# ```
#
# `Budget` stops a run before it spends more than it should, `explainer=` lets another model explain, and
# `setting="paper"` follows the published procedure, which takes a call for every question and all features: estimate it
# before. On the shell, for a folder that `bae-lens demo`, `compare` or `train` has written:
#
# ```bash
# bae-lens comsem runs/side_by_side --judge-model gpt-4.1-mini --dry-run --price-input 0.4 --price-output 1.6
# ```
