from typing import Any

import pytest
import torch

from bae_lens import BinaryTranscoder, BinaryTranscoderConfig, TrainingBAE
from bae_lens.activations.cache import CachedActivations
from bae_lens.activations.cache_writer import cache_activations
from bae_lens.evaluation.features import feature_dashboards
from bae_lens.evaluation.metrics import evaluate_dictionary
from bae_lens.training.recipe import Recipe, TrainingSettings
from bae_lens.training.trainer import train_dictionary


@pytest.fixture
def states(states: Any) -> CachedActivations:
    return states[0]


def test_examples_are_the_strongest_token_of_each_context_in_its_sentence(
    states, tiny_model, tiny_tokenizer, identity_bae
):
    bae = identity_bae(16)
    rates = evaluate_dictionary(bae, states.rows(states.content)).code.firing_rates
    features = feature_dashboards(bae, states, tiny_model, rates, n_features=3, n_examples=4, window=2)
    assert len(features) == 3
    graded = (states.rows(torch.arange(states.contexts.tokens.numel())) - 0.5).view(*states.contexts.tokens.shape, 16)
    for feature in features:
        assert feature.firing_rate == rates[feature.feature]
        strengths = graded[:, 1:, feature.feature]  # BOS is no content
        per_context = strengths.max(1).values.sort(descending=True)
        assert [e.activation for e in feature.examples] == pytest.approx(per_context.values[:4].tolist(), rel=1e-4)
        context = int(per_context.indices[0])
        position = 1 + int(strengths[context].argmax())
        tokens = states.contexts.tokens[context]
        tokens = tokens[tokens >= 0]
        best = feature.examples[0]
        assert best.token == tiny_tokenizer.decode([tokens[position]])
        assert best.after == tiny_tokenizer.decode(tokens[position + 1 : position + 3])
        assert best.before == tiny_tokenizer.decode(tokens[max(0, position - 2) : position], skip_special_tokens=True)


def test_examples_at_hook_z_take_heads_concatenated(tiny_model, states, bae_config, tmp_path):
    hook = "blocks.0.attn.hook_z"
    z = cache_activations(tiny_model, states.contexts, [hook], tmp_path / "z")[hook]
    settings = TrainingSettings(training_tokens=64, batch_size=32)
    sae = train_dictionary("bae", Recipe(bae_config(encoder_bias_init=0.0), lr=1e-3), z, settings, tmp_path).sae
    rates = evaluate_dictionary(sae, z.rows(z.content)).code.firing_rates
    assert len(feature_dashboards(sae, z, tiny_model, rates, n_features=3)) == 3


def test_features_shown_are_a_seeded_sample_of_those_that_fire_often_enough(states, tiny_model, identity_bae):
    bae = identity_bae(16)
    rates = [8 / len(states.content)] * 4 + [7 / len(states.content)] * 12
    shown = feature_dashboards(bae, states, tiny_model, rates, n_features=16)
    assert [feature.feature for feature in shown] == [0, 1, 2, 3]
    some = [[f.feature for f in feature_dashboards(bae, states, tiny_model, rates, 2, seed=seed)] for seed in range(9)]
    assert len({tuple(features) for features in some}) > 1


def test_neighbors_are_the_nearest_decoder_rows(states, tiny_model, bae_config):
    bae = TrainingBAE(bae_config(encoder_bias_init=0.0)).to_inference()
    bae.W_dec.data.normal_()
    features = feature_dashboards(bae, states, tiny_model, [0.5] * 64, n_features=5)
    for feature in features:
        cosines = torch.cosine_similarity(bae.W_dec[feature.feature], bae.W_dec, dim=-1)
        nearest = [int(index) for index in cosines.argsort(descending=True) if index != feature.feature][:5]
        assert [neighbor.feature for neighbor in feature.neighbors] == nearest
        assert [n.cosine for n in feature.neighbors] == pytest.approx(cosines[nearest].tolist(), abs=1e-6)


def test_top_tokens_are_what_the_decoder_row_makes_likely(states, tiny_model, tiny_tokenizer, identity_bae):
    bae = identity_bae(16)
    bae.cfg.metadata.hook_name = states.hook_name
    bae.W_dec.data.normal_(mean=1.0)
    tiny_model.ln_final.w.data = torch.rand(16)
    (feature,) = feature_dashboards(bae, states, tiny_model, [0.5, *[0.0] * 15], n_features=1)
    assert feature.feature == 0
    centered = bae.W_dec[0] - bae.W_dec[0].mean()  # as the model's LayerNorm does
    logits = (centered * tiny_model.ln_final.w) @ tiny_model.W_U
    expected = [tiny_tokenizer.decode([token]) for token in logits.topk(8).indices.tolist()]
    assert feature.top_tokens == expected
    bae.cfg.metadata.hook_name = "blocks.0.attn.hook_z"  # as wide, but no direction of the residual stream
    (feature,) = feature_dashboards(bae, states, tiny_model, [0.5, *[0.0] * 15], n_features=1)
    assert feature.top_tokens == []


def test_transcoder_is_shown_by_its_input_and_its_output_direction(pairs, tiny_model):
    sae = BinaryTranscoder(BinaryTranscoderConfig(d_in=16, d_sae=64, d_out=32))
    rates = evaluate_dictionary(
        sae, *(side.rows(side.content) for side in (pairs.source, pairs.target))
    ).code.firing_rates
    features = feature_dashboards(sae, pairs.source, tiny_model, rates, n_features=4, n_examples=2)
    assert [feature.top_tokens for feature in features] == [[]] * 4  # 32 wide is no direction of the residual stream
    for feature in features:
        assert feature.firing_rate == rates[feature.feature]
        strength = pairs.source.rows(pairs.source.content) @ sae.W_enc[:, feature.feature]
        assert feature.examples[0].activation == pytest.approx(strength.max().item(), rel=1e-4)
