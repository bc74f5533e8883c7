from itertools import islice

import pytest
import torch
from sae_lens import Transcoder, TranscoderConfig

from bae_lens import BinaryTranscoder, BinaryTranscoderConfig, TrainingTopKTranscoder, TrainingTopKTranscoderConfig
from bae_lens.activations.cache import CachedActivations
from bae_lens.activations.cache_writer import cache_activations
from bae_lens.activations.paired import PairedActivations
from bae_lens.saes.standardization import PairStandardization, Standardization


def test_rows_are_those_of_both_hooks_for_the_same_tokens(pairs):
    source, target = pairs.source.shuffled(64, 3), pairs.target.shuffled(64, 3)
    for batch in islice(pairs.shuffled(64, 3), 12):  # over an epoch
        assert batch.shape == (64, 16 + 32)
        assert torch.equal(batch[:, :16], next(source))
        assert torch.equal(batch[:, 16:], next(target))


def test_each_row_is_one_token_at_both_hooks(pairs, tiny_model):
    batch = next(pairs.shuffled(64, 0))
    _, cache = tiny_model.run_with_cache(pairs.source.contexts.tokens.clamp(min=0), prepend_bos=False)
    before = pairs.source.standardization(cache[pairs.hook_name].flatten(0, 1)[pairs.source.content])
    after = pairs.target.standardization(cache[pairs.hook_name_out].flatten(0, 1)[pairs.source.content])
    token = torch.cdist(batch[:, :16], before).argmin(1)
    torch.testing.assert_close(batch[:, :16], before[token], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batch[:, 16:], after[token], rtol=1e-4, atol=1e-4)


def test_batches_from_a_later_step_are_those_of_the_whole_run(pairs):
    expected = list(islice(pairs.shuffled(64, 1), 14))[13]
    assert torch.equal(next(pairs.shuffled(64, 1, start_step=13)), expected)


def test_hooks_and_widths_are_those_of_both_sides(pairs):
    assert (pairs.hook_name, pairs.hook_name_out) == ("blocks.1.mlp.hook_in", "blocks.1.mlp.hook_post")
    assert pairs.widths == {"blocks.1.mlp.hook_in": 16, "blocks.1.mlp.hook_post": 32}


@pytest.mark.parametrize("kind", ["relu", "binary", "topk", "rescaled topk"])
def test_folding_is_exact(kind):
    sizes = {"d_in": 5, "d_sae": 40, "d_out": 7, "dtype": "float64"}
    if kind == "relu":
        sae = Transcoder(TranscoderConfig(**sizes, apply_b_dec_to_input=False))
    elif kind == "binary":
        sae = BinaryTranscoder(BinaryTranscoderConfig(**sizes))
    else:
        rescale = kind == "rescaled topk"
        sae = TrainingTopKTranscoder(TrainingTopKTranscoderConfig(**sizes, k=6, rescale_acts_by_decoder_norm=rescale))
    for parameter in sae.parameters():
        parameter.data.normal_()
    source, target = Standardization(torch.randn(5), 0.37), Standardization(torch.randn(7), 4.2)
    x = 3 * torch.randn(64, 5, dtype=torch.float64)
    code = sae.encode(source(x))
    expected = sae(source(x)) / target.scale + target.mean.double()

    PairStandardization(source, target).fold_into(sae)

    torch.testing.assert_close(sae(x), expected, rtol=0, atol=1e-10)
    assert torch.equal(sae.encode(x) != 0, code != 0)


def test_standardization_is_that_of_each_side(pairs):
    standardization = pairs.standardization
    assert standardization.source.scale == pairs.source.standardization.scale
    assert torch.equal(standardization.target.mean, pairs.target.standardization.mean)
    assert standardization.source.scale != standardization.target.scale


def test_other_cache_is_refused(pairs, tiny_model, tiny_contexts, tmp_path):
    hook = "blocks.1.mlp.hook_post"
    other = cache_activations(tiny_model, tiny_contexts["test"], [hook], tmp_path / "other")[hook]
    with pytest.raises(ValueError, match=r"both hooks from one cache, got .*pairs and .*other; cache them"):
        PairedActivations(pairs.source, other)
    assert PairedActivations(pairs.source, CachedActivations(pairs.source.folder, hook)).hook_name_out == hook
