import math
from typing import Any

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig

from bae_lens import BAE, BAEConfig
from bae_lens.contexts import PADDING, Contexts
from bae_lens.evals import LossMeter, activated_features, evaluate_dictionary, feature_examples
from bae_lens.harvest import HiddenStates, harvest
from bae_lens.training import Recipe, TrainingSettings, train_dictionary

HOOK = "blocks.0.hook_resid_post"


def identity_bae(d: int) -> BAE:
    """A BAE that reads and writes non-negative axes: feature j is on where x_j >= 1/2."""
    bae = BAE(BAEConfig(d_in=d, d_sae=d))
    bae.load_state_dict(
        {
            "W_enc": torch.eye(d),
            "b_enc": torch.full((d,), -0.5),
            "W_dec": torch.eye(d),
            "b_dec": torch.zeros(d),
            "prior": torch.zeros(d),
        }
    )
    return bae


@pytest.fixture
def states(states: Any) -> HiddenStates:
    return states[0]


def test_metrics_of_a_known_code():
    # columns: always on, never on, on for 2 of 8, on for 6 of 8, and 8 rows
    codes = torch.tensor([[1, 0, i < 2, i < 6] for i in range(8)], dtype=torch.float32)
    bae = identity_bae(4)
    metrics = evaluate_dictionary(bae, codes, batch_size=3)
    assert metrics.n_tokens == 8
    assert metrics.explained_variance == 1
    assert metrics.firing_rates == [1, 0, 0.25, 0.75]
    assert metrics.l0 == 2.0
    assert metrics.informative_l0 == 0.5
    quarter = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))  # 0.8113 bits, twice
    assert metrics.support_bits == pytest.approx(2 * quarter)
    assert (metrics.never_on, metrics.always_on, metrics.dense) == (1, 1, 2)
    assert torch.equal(bae.prior, torch.tensor([1, 0, 0.25, 0.75]))


def test_explained_variance_is_one_minus_error_over_variance():
    bae = identity_bae(2)
    x = torch.tensor([[0.0, 0.8], [1.0, 0.0], [0.0, 1.0], [1.4, 0.0]])
    # errors 0.2^2 + 0.4^2 = 0.2; means 0.6 and 0.45
    # squared distances 0.36 + 0.16 + 0.36 + 0.64 and 0.35^2 + 2 * 0.45^2 + 0.55^2
    expected = 1 - 0.2 / (1.52 + 0.1225 + 0.405 + 0.3025)
    assert evaluate_dictionary(bae, x).explained_variance == pytest.approx(expected, rel=1e-6)


def test_feature_activated_needs_eight_instances():
    codes = torch.zeros(100, 3)
    codes[:8, 0] = 1
    codes[8:15, 1] = 1
    assert evaluate_dictionary(identity_bae(3), codes).feature_activated == 1


def test_bae_counts_surprising_zeros_as_activated_and_a_relu_sae_its_ten_largest_positive():
    bae = identity_bae(2)
    bae.prior.copy_(torch.tensor([0.9, 0.1]))
    assert activated_features(bae, torch.tensor([[1.0, 0.0], [0.0, 1.0]])).tolist() == [[-1, -1], [0, 1]]
    sae = StandardSAE(StandardSAEConfig(d_in=2, d_sae=12))
    strengths = torch.tensor([[0.0, 3, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11], [0.0] * 11 + [1]])
    assert activated_features(sae, strengths).tolist() == [[11, 10, 9, 8, 7, 6, 5, 4, 1, 3], [11] + [-1] * 9]


def test_bae_that_never_fires_is_measured():
    metrics = evaluate_dictionary(identity_bae(3), torch.rand(9, 3) / 4)
    assert (metrics.l0, metrics.never_on, metrics.feature_activated, metrics.support_bits) == (0, 3, 0, 0)


def test_nothing_to_evaluate_on_is_refused():
    with pytest.raises(ValueError, match="no hidden states"):
        evaluate_dictionary(identity_bae(2), torch.zeros(0, 2))


def relu_identity(d: int) -> StandardSAE:
    """Reads every axis in both directions, so that it gives back what it is given."""
    sae = StandardSAE(StandardSAEConfig(d_in=d, d_sae=2 * d, apply_b_dec_to_input=False))
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    sae.load_state_dict({"W_enc": both.T, "b_enc": torch.zeros(2 * d), "W_dec": both, "b_dec": torch.zeros(d)})
    return sae


def test_loss_with_a_perfect_dictionary_is_the_models_own(tiny_model, states):
    loss = LossMeter(tiny_model, states, n_contexts=50)(relu_identity(16))
    tokens = states.contexts.tokens
    own = tiny_model(tokens.clamp(min=0), return_type="loss", loss_per_token=True)
    scored = (tokens[:, 1:] != PADDING) & (torch.arange(15) > 0)  # BOS' own prediction is left out
    assert loss.n_tokens == scored.sum() == 550
    assert loss.clean == pytest.approx(own[scored].mean().item(), rel=1e-5)
    assert loss.with_sae == pytest.approx(loss.clean, abs=1e-5)
    assert loss.recovered == pytest.approx(1, abs=1e-3)


def test_loss_replaces_content_only(tiny_model, states):
    meter = LossMeter(tiny_model, states, n_contexts=4)
    seen = []

    def record(activations, hook):  # noqa: ARG001
        seen.append(activations)

    _, cache = tiny_model.run_with_cache(meter.tokens.clamp(min=0), prepend_bos=False)
    tiny_model.add_hook("blocks.1.hook_resid_pre", record)
    sae = relu_identity(16)
    sae.b_dec.data[3] = 7
    loss = meter(sae)
    assert abs(loss.with_sae - loss.clean) > 1e-3
    shift = seen[0] - cache[HOOK]
    assert torch.allclose(shift[meter.content][:, 3], torch.tensor(7.0), atol=1e-5)
    assert (shift[~meter.content] == 0).all()
    assert not meter.content[:, 0].any()


def test_loss_is_measured_on_contexts_spread_over_all(tiny_model, states):
    meter = LossMeter(tiny_model, states, n_contexts=3)
    assert torch.equal(meter.tokens, states.contexts.tokens[[0, 24, 49]])


def test_loss_of_short_documents_is_measured(tiny_model, tmp_path):
    short = harvest(tiny_model, Contexts(torch.tensor([[0, 5, 6, -1]]), torch.tensor([0])), HOOK, tmp_path / "short")
    assert LossMeter(tiny_model, short, n_contexts=5)(relu_identity(16)).n_tokens == 1


def test_nothing_to_predict_is_refused(tiny_model, tmp_path):
    lonely = harvest(tiny_model, Contexts(torch.tensor([[0, 5, -1]]), torch.tensor([0])), HOOK, tmp_path / "lonely")
    with pytest.raises(ValueError, match="no held-out token has a next one to predict"):
        LossMeter(tiny_model, lonely, n_contexts=5)


def test_loss_at_hook_z_takes_heads_concatenated(tiny_model, states, tmp_path):
    z = harvest(tiny_model, states.contexts, "blocks.1.attn.hook_z", tmp_path / "z")
    assert LossMeter(tiny_model, z, n_contexts=2)(relu_identity(16)).recovered == pytest.approx(1, abs=1e-2)


def test_examples_are_the_strongest_token_of_each_context_in_its_sentence(states, tiny_tokenizer):
    bae = identity_bae(16)
    rates = evaluate_dictionary(bae, states.rows(states.content)).firing_rates
    features = feature_examples(bae, states, tiny_tokenizer, rates, n_features=3, n_examples=4, window=2)
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


def test_examples_at_hook_z_take_heads_concatenated(tiny_model, states, bae_config, tiny_tokenizer, tmp_path):
    z = harvest(tiny_model, states.contexts, "blocks.0.attn.hook_z", tmp_path / "z")
    settings = TrainingSettings(training_tokens=64, batch_size=32)
    sae = train_dictionary("bae", Recipe(bae_config(encoder_bias_init=0.0), lr=1e-3), z, settings, tmp_path).sae
    rates = evaluate_dictionary(sae, z.rows(z.content)).firing_rates
    assert len(feature_examples(sae, z, tiny_tokenizer, rates, n_features=3)) == 3


def test_features_shown_are_a_seeded_sample_of_those_that_fire_often_enough(states, tiny_tokenizer):
    bae = identity_bae(16)
    rates = [8 / len(states.content)] * 4 + [7 / len(states.content)] * 12
    shown = feature_examples(bae, states, tiny_tokenizer, rates, n_features=16)
    assert [feature.feature for feature in shown] == [0, 1, 2, 3]
    some = [
        [f.feature for f in feature_examples(bae, states, tiny_tokenizer, rates, 2, seed=seed)] for seed in range(9)
    ]
    assert len({tuple(features) for features in some}) > 1
