from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig, Transcoder, TranscoderConfig

from bae_lens import BAE, BAEConfig
from bae_lens.comsem.collect.collector import collect
from bae_lens.comsem.collect.corpus import CorpusSettings, text_contexts
from bae_lens.comsem.collect.sampling import FeatureSampler, SamplingSettings

NAMES = ("digits", "the", "sentence end", "nothing")
CORPUS = CorpusSettings(tokens=1500, context_size=16)
SAMPLING = SamplingSettings(max_features=None)


def rules(text: str) -> list[bool]:
    return [text in "12345", text == "the", text == ".", text.lower().endswith(("1", "3", "7"))]


@pytest.fixture(scope="module")
def collection(word_model, make_sae, make_bae, word_texts):
    return collect(word_model, {"sae": make_sae(), "bae": make_bae()}, word_texts, CORPUS, SAMPLING)


def test_instances_are_tokens_on_which_the_feature_fires(collection):
    for dictionary in collection.dictionaries.values():
        assert [instances.feature for instances in dictionary.features] == [0, 1, 2, 3]
        assert dictionary.feature_activated == dictionary.scoreable == 4
        for instances in dictionary.features:
            shown = [*instances.explain, *instances.held_out]
            assert (len(instances.explain), len(instances.held_out)) == (5, 8)
            assert all(rules(instance.text)[instances.feature] for instance in shown)


def test_binary_and_real_codes_of_the_same_features_give_the_same_instances(collection):
    sae, bae = collection.dictionaries["sae"], collection.dictionaries["bae"]
    assert sae.features == bae.features


def test_a_transcoder_is_read_at_its_input(word_model, known_sae, word_texts, collection):
    transcoder = Transcoder(TranscoderConfig(d_in=64, d_sae=4, d_out=64, apply_b_dec_to_input=False))
    weights = {name: value for name, value in known_sae.state_dict().items() if name in ("W_enc", "b_enc")}
    transcoder.load_state_dict({**transcoder.state_dict(), **weights})
    transcoder.cfg.metadata.hook_name = "blocks.0.hook_resid_pre"
    transcoder.cfg.metadata.hook_name_out = "blocks.1.hook_resid_post"
    collected = collect(word_model, {"transcoder": transcoder}, word_texts, CORPUS, SAMPLING)
    assert collected.dictionaries["transcoder"] == collection.dictionaries["sae"]


def test_no_sentence_is_shown_twice(collection):
    for instances in collection.dictionaries["sae"].features:
        sentences = [instance.sentence for instance in [*instances.explain, *instances.held_out]]
        assert len(set(sentences)) == len(sentences)


def test_highlights_are_all_tokens_of_the_sentence_on_which_the_feature_fires(collection):
    found = 0
    for instances in collection.dictionaries["sae"].features:
        for instance in [*instances.explain, *instances.held_out]:
            words = instance.sentence.replace(".", " .").split()
            expected = [word for word in words if rules(word)[instances.feature]]
            shown = [instance.sentence[start:end] for start, end in instance.highlights]
            assert shown == expected
            assert instance.token in instance.highlights
            found += len(shown) > 1
    assert found > 3


def test_controls_stand_in_sentences_without_the_feature_and_are_highlighted_as_much(collection):
    instances = collection.dictionaries["sae"].features[1]
    assert len(instances.controls) == 8
    assert all("the" not in instance.sentence.split() for instance in instances.controls)
    assert [len(instance.highlights) for instance in instances.controls] == [1] * 8
    several = collection.dictionaries["sae"].features[3]
    wanted = [len(instance.highlights) for instance in several.held_out]
    assert [len(instance.highlights) for instance in several.controls] == wanted
    assert max(wanted) > 1


def test_special_tokens_are_neither_instances_nor_counted(word_model, known_sae, word_texts):
    known_sae.W_enc.data[0, 0] = 5.0  # fires on BOS too
    collected = collect(word_model, {"sae": known_sae}, word_texts, CORPUS, SAMPLING)
    assert collected.n_tokens == 1500
    assert collected.n_documents == len(set(documents_of(word_model, word_texts)))
    for instances in collected.dictionaries["sae"].features:
        assert all(instance.text for instance in [*instances.explain, *instances.held_out, *instances.controls])
    digits = sum(word_texts_digits(word_model, word_texts, known_sae, CORPUS))
    assert collected.dictionaries["sae"].features[0].firing_rate * 1500 == pytest.approx(digits)


def documents_of(model, texts):
    return [context.document for context in text_contexts(model.tokenizer, texts, CORPUS, 0)]


def word_texts_digits(model, texts, sae, corpus):
    for context in text_contexts(model.tokenizer, texts, corpus, 0):
        yield sum(bool(sae.W_enc[token, 0] > 0) for token in context.tokens[1:])


def test_zero_activation_is_never_activated(word_model, word_texts):
    sae = StandardSAE(StandardSAEConfig(d_in=64, d_sae=4))
    sae.load_state_dict({name: torch.zeros_like(value) for name, value in sae.state_dict().items()})
    sae.cfg.metadata.hook_name = "blocks.0.hook_resid_pre"
    collected = collect(word_model, {"sae": sae}, word_texts, CORPUS, SAMPLING).dictionaries["sae"]
    assert (collected.feature_activated, collected.scoreable, collected.features) == (0, 0, [])


@pytest.mark.parametrize("leave_nothing_out", [False, True])
def test_rescaled_activations_are_ranked_by_deviations_above_their_mean(word_model, word_texts, leave_nothing_out):
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=64, d_sae=40))
    sae.load_state_dict({name: torch.randn_like(value) for name, value in sae.state_dict().items()})
    sae.cfg.metadata.hook_name = "blocks.0.hook_resid_pre"
    sampling = replace(SAMPLING, rescale=True, leave_nothing_out=leave_nothing_out)
    collected = collect(word_model, {"sae": sae}, word_texts, CORPUS, sampling).dictionaries["sae"]
    tokens = [t for context in text_contexts(word_model.tokenizer, word_texts, CORPUS, 0) for t in context.tokens[1:]]
    acts = sae.encode(word_model.W_E[tokens]).double()
    strength = (acts - acts.mean(0)) / (acts.std(0, correction=0) + 1e-6)
    top = strength.sort(dim=1, descending=True, stable=True)
    kept = top.indices[:, :10] if leave_nothing_out else top.indices[:, :10][top.values[:, :10] > 0]
    expected = torch.bincount(kept.flatten(), minlength=40)
    found = {instances.feature: instances.n_instances for instances in collected.features}
    assert found == {feature: n for feature, n in enumerate(expected.tolist()) if feature in found}
    assert len(found) > 20
    assert collected.feature_activated == int((expected >= 8).sum())
    rates = torch.tensor([instances.firing_rate for instances in collected.features])
    torch.testing.assert_close(rates, (acts > 0).double().mean(0)[sorted(found)].float())
    by_size = collect(word_model, {"sae": sae}, word_texts, CORPUS, replace(sampling, rescale=False))
    assert [f.n_instances for f in by_size.dictionaries["sae"].features] != [f.n_instances for f in collected.features]


def test_rescaling_leaves_binary_codes_as_they_are(word_model, known_bae, word_texts, collection):
    sampling = replace(SAMPLING, rescale=True)
    collected = collect(word_model, {"bae": known_bae}, word_texts, CORPUS, sampling)
    assert collected.dictionaries["bae"] == collection.dictionaries["bae"]


def test_prior_is_the_exact_firing_rate_over_the_corpus(word_model, known_bae, word_texts):
    known_bae.prior.fill_(0.9)  # with which nothing would be surprising but silence
    collected = collect(word_model, {"bae": known_bae}, word_texts, CORPUS, SAMPLING).dictionaries["bae"]
    rates = torch.tensor([instances.firing_rate for instances in collected.features])
    tokens = [t for context in text_contexts(word_model.tokenizer, word_texts, CORPUS, 0) for t in context.tokens[1:]]
    assert torch.equal(rates, known_bae.encode(word_model.W_E[tokens]).mean(0))
    n = torch.tensor([instances.n_instances for instances in collected.features])
    assert torch.equal(n, (rates * 1500).round().long())


@pytest.fixture
def bae_at_z():
    """At hook_z of the second layer: 2 heads of 8."""
    bae = BAE(BAEConfig(d_in=16, d_sae=4, reshape_activations="hook_z"))
    bae.cfg.metadata.hook_name = "blocks.1.attn.hook_z"
    bae.turn_on_forward_pass_hook_z_reshaping()
    return bae


@pytest.mark.parametrize("fails", [False, True])
def test_dictionaries_stay_as_they_are(word_model, known_bae, bae_at_z, word_texts, monkeypatch, fails):
    dictionaries = {"known": known_bae, "at z": bae_at_z}
    for bae in dictionaries.values():
        bae.prior.fill_(0.3)
    before = {name: deepcopy(bae.state_dict()) for name, bae in dictionaries.items()}
    if fails:
        monkeypatch.setattr(FeatureSampler, "finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        collect(word_model, dictionaries, word_texts, replace(CORPUS, tokens=300), SAMPLING)
    for name, bae in dictionaries.items():
        torch.testing.assert_close(dict(bae.state_dict()), before[name], rtol=0, atol=0, equal_nan=True)
        assert set(before[name]) == set(bae.state_dict())
    assert (known_bae.hook_z_reshaping_mode, bae_at_z.hook_z_reshaping_mode) == (False, True)
    assert bae_at_z(torch.randn(2, 3, 2, 8)).shape == (2, 3, 2, 8)


@pytest.mark.parametrize("in_corpus_order", [False, True])
def test_background_stands_in_no_sentence_of_which_anything_is_asked(
    word_model, known_sae, word_texts, in_corpus_order
):
    sampling = replace(SAMPLING, in_corpus_order=in_corpus_order)
    collected = collect(word_model, {"sae": known_sae}, word_texts, CORPUS, sampling)
    (dictionary,) = collected.dictionaries.values()
    asked = [
        instance.sentence
        for instances in [*dictionary.features, *dictionary.random_features]
        for instance in [*instances.explain, *instances.held_out, *instances.controls]
    ]
    background = {instance.sentence for instance in collected.background}
    assert len(background) > 3
    assert len(collected.background) > 40
    assert not background & set(asked)
    tokens = collected.background[0].text, collected.background[0].sentence
    assert tokens[0] in tokens[1]


def test_a_bit_that_is_mostly_on_is_activated_by_its_absence(word_model, known_bae, word_texts):
    known_bae.W_enc.data[:, 1] = 1.0
    known_bae.W_enc.data[4, 1] = 0.0  # off on "the" alone
    collected = collect(word_model, {"bae": known_bae}, word_texts, CORPUS, SAMPLING).dictionaries["bae"]
    assert all(instance.text == "the" for instance in collected.features[1].held_out)


def test_papers_instances_are_the_first_of_the_corpus(word_model, known_sae, word_texts):
    corpus = replace(CORPUS, contexts_per_document=None)
    sampling = replace(SAMPLING, in_corpus_order=True)
    collected = collect(word_model, {"sae": known_sae}, word_texts, corpus, sampling).dictionaries["sae"]
    text = " ".join(word_texts).replace(".", " .").split()
    for instances in collected.features:
        shown = [instance.text for instance in [*instances.explain, *instances.held_out]]
        assert shown == [word for word in text if rules(word)[instances.feature]][:13]


def test_seed_decides_and_repeats(word_model, known_sae, word_texts):
    def run(seed):
        corpus = replace(CORPUS, tokens=600)
        return collect(word_model, {"sae": known_sae}, word_texts, corpus, replace(SAMPLING, seed=seed))

    assert run(0) == run(0)
    assert run(0) != run(1)


def test_features_are_sampled_and_random_features_are_no_features(word_model, known_sae, word_texts):
    collected = collect(word_model, {"sae": known_sae}, word_texts, CORPUS, replace(SAMPLING, max_features=2))
    dictionary = collected.dictionaries["sae"]
    assert (len(dictionary.features), dictionary.scoreable) == (2, 4)
    assert len(dictionary.random_features) > 5
    sentences = [i.sentence for f in dictionary.random_features for i in [*f.explain, *f.held_out]]
    assert len(set(sentences)) > 0.9 * len(sentences)


def test_hooks_are_read_in_one_pass_that_stops_at_the_deepest(
    word_model, known_sae, known_bae, word_texts, monkeypatch
):
    calls = []
    run_with_cache = word_model.run_with_cache

    def spy(tokens, **options):
        calls.append(options)
        return run_with_cache(tokens, **options)

    monkeypatch.setattr(word_model, "run_with_cache", spy)
    known_bae.cfg.metadata.hook_name = "blocks.1.hook_resid_pre"
    collect(word_model, {"sae": known_sae, "bae": known_bae}, word_texts, replace(CORPUS, tokens=200), SAMPLING)
    assert all(call["names_filter"] == ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"] for call in calls)
    assert all(call["stop_at_layer"] == 2 for call in calls)
    assert len(calls) == 1


def test_what_does_not_fit_the_model_is_refused(word_model, known_sae, word_texts):
    with pytest.raises(ValueError, match="no tokens of content"):
        collect(word_model, {"sae": known_sae}, [" "], CORPUS, SAMPLING)
    wide = StandardSAE(StandardSAEConfig(d_in=8, d_sae=4))
    wide.cfg.metadata.hook_name = "blocks.0.hook_resid_pre"
    with pytest.raises(
        ValueError, match=r"takes 8 wide activations, but blocks\.0\.hook_resid_pre of this model is 64"
    ):
        collect(word_model, {"wide": wide}, word_texts, CORPUS, SAMPLING)
    known_sae.cfg.metadata.hook_name = "blocks.7.hook_resid_pre"
    with pytest.raises(ValueError, match="the model has no hook"):
        collect(word_model, {"sae": known_sae}, word_texts, CORPUS, SAMPLING)


def test_samples_do_not_grow_with_the_corpus(word_model, known_sae, word_texts, monkeypatch):
    from bae_lens.comsem.collect import collector as module

    samplers = []

    class Sampler(module.FeatureSampler):
        def __init__(self, *args):
            super().__init__(*args)
            samplers.append(self)

    monkeypatch.setattr(module, "FeatureSampler", Sampler)

    def size(tokens):
        collect(word_model, {"sae": known_sae}, word_texts, replace(CORPUS, tokens=tokens), SAMPLING)
        sampler = samplers[-1]
        return [
            tensor.shape
            for tensor in (sampler.reservoirs.keys, sampler.reservoirs.items, sampler.pool.items, sampler.pool.bits)
        ]

    monkeypatch.setattr("bae_lens.comsem.collect.sampling.POOL_SIZE", 64)
    assert size(800) == size(3200)


@pytest.mark.parametrize("contexts_per_batch", [1, 3, 7])
def test_what_content_is_does_not_depend_on_batches(word_model, known_sae, word_texts, monkeypatch, contexts_per_batch):
    scales = 4.0 ** (torch.arange(len(word_model.W_E)) % 7)  # some words are outliers among others
    monkeypatch.setattr(word_model.W_E, "data", scales[:, None] * word_model.W_E.data)
    model = word_model
    whole = collect(model, {"sae": known_sae}, word_texts, CORPUS, SAMPLING)
    assert 0 < whole.n_tokens < 1500
    monkeypatch.setattr("bae_lens.comsem.collect.collector.CONTEXTS_PER_BATCH", contexts_per_batch)
    parts = collect(model, {"sae": known_sae}, word_texts, CORPUS, SAMPLING)
    rates = [feature.firing_rate for feature in parts.dictionaries["sae"].features]
    assert parts.n_tokens == whole.n_tokens
    assert rates == [feature.firing_rate for feature in whole.dictionaries["sae"].features]


def test_a_tokenizer_may_have_gaps_among_its_ids(word_model, known_sae, word_texts, monkeypatch):
    monkeypatch.setattr(type(word_model.tokenizer), "__len__", lambda _: 20)
    assert collect(word_model, {"sae": known_sae}, word_texts, CORPUS, SAMPLING).n_tokens == 1500
