import copy
import shutil
from itertools import islice

import pytest
import torch

from bae_lens.activations import batch_order, streaming
from bae_lens.activations import cache as cache_module
from bae_lens.activations.cache_writer import cache_activations
from bae_lens.activations.contexts import Contexts, ContextSettings, choose_contexts, first_contexts
from bae_lens.activations.forward import hook_widths
from bae_lens.activations.paired import PairedActivations
from bae_lens.activations.precision import Dtype
from bae_lens.activations.streaming import StreamedActivations
from bae_lens.storage import open_array

HOOK, INSIDE = "blocks.0.hook_resid_post", "blocks.1.mlp.hook_post"
OUTLIER = 7 * 9 + 4


@pytest.fixture
def contexts(tiny_tokenizer, tiny_dataset):
    """80 contexts of 9 tokens, one of them BOS."""
    return choose_contexts(tiny_tokenizer, tiny_dataset, ContextSettings(context_size=9, cached_tokens=640))["train"]


@pytest.fixture
def runs(tiny_model, contexts, monkeypatch):
    """How many contexts each pass of the model had, in which a token of the eighth context is an outlier."""
    hook_widths(tiny_model, [HOOK, INSIDE])
    run, calls = tiny_model.run_with_cache, []

    def counted(tokens, **kwargs):
        calls.append(len(tokens))
        output, cache = run(tokens, **kwargs)
        cache[HOOK][(tokens == contexts.tokens[7]).all(1).nonzero(), 4] *= 100
        return output, cache

    monkeypatch.setattr(tiny_model, "run_with_cache", counted)
    return calls


@pytest.fixture
def small_windows(monkeypatch):
    """Windows of 4 blocks of 3 contexts, which have 27 rows."""
    monkeypatch.setattr(streaming, "BLOCK_ROWS", 32)
    monkeypatch.setattr(cache_module, "BLOCK_ROWS", 27)
    monkeypatch.setattr(batch_order, "WINDOW_BLOCKS", 4)


@pytest.fixture
def cached(tiny_model, contexts, runs, tmp_path):
    """Makes a cache of the first contexts, at one hook or the two of a transcoder."""

    def cached(hooks=(HOOK,), n=80, dtype: Dtype = "float32", batch_size=80):
        some = Contexts(contexts.tokens[:n], contexts.document[:n])
        sides = cache_activations(tiny_model, some, hooks, tmp_path / f"first {n}", batch_size, dtype).values()
        runs.clear()
        return PairedActivations(*sides) if len(hooks) > 1 else next(iter(sides))

    return cached


@pytest.fixture
def streamed(tiny_model, contexts, tmp_path):
    def streamed(sample, **options):
        return StreamedActivations(tiny_model, contexts, sample, tmp_path / "stream", **options)

    return streamed


def batches(activations, n, start=0):
    return list(islice(activations.shuffled(50, 3, start), n))


def assert_same(found, expected):
    assert all(map(torch.equal, found, expected))
    assert len(found) == len(expected)


@pytest.mark.parametrize("hooks", [(HOOK,), (HOOK, INSIDE)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batches_are_those_of_a_cache_where_the_sample_is_all(cached, streamed, hooks, dtype):
    whole = cached(hooks, dtype=dtype)
    stream = streamed(whole)
    assert_same(batches(stream, 30), batches(whole, 30))
    assert stream.widths == whole.widths
    source = whole.source if len(hooks) > 1 else whole
    assert torch.equal(stream.content, source.content)
    assert stream.outliers.nonzero().flatten().tolist() == source.outliers.nonzero().flatten().tolist() == [OUTLIER]
    assert torch.equal(stream.contexts.tokens, source.contexts.tokens)
    assert torch.equal(stream.special, source.special)
    assert torch.equal(stream.relative_norms, source.relative_norms)


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("hooks", [(HOOK,), (HOOK, INSIDE)])
@pytest.mark.parametrize("keeps_own", [False, True])
def test_windows_are_computed_when_they_are_due_and_once_if_they_are_kept(cached, streamed, runs, keeps_own, hooks):
    whole = cached(hooks, batch_size=3)
    stream = streamed(whole, keeps_own=keeps_own)
    found, computed = [], []
    for batch in islice(stream.shuffled(50, 3), 24):  # of 639 rows twelve batches an epoch
        found.append(batch)
        computed.append(sum(runs))
    assert_same(found, batches(whole, 24))
    assert computed[0] == 12
    assert computed[2] <= 24
    assert computed[11] == 80
    assert computed[23] == (80 if keeps_own else 160)
    assert stream.order == whole.order == "windows of 4 blocks of 27 rows"


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("keeps_own", [False, True])
def test_a_later_start_goes_on_with_the_next_batch_and_computes_what_is_due(cached, streamed, runs, keeps_own):
    sample = cached(n=30)
    expected = batches(streamed(sample, keeps_own=keeps_own), 27)
    for step in (3, 12, 25):
        runs.clear()
        assert_same(batches(streamed(sample, keeps_own=keeps_own), 1, step), expected[step : step + 1])
        assert sum(runs) == 0 if keeps_own else 8 <= sum(runs) <= 24
    for step in (3, 25):
        shutil.rmtree(streamed(sample).folder)
        assert_same(batches(streamed(sample), 1, step), expected[step : step + 1])


@pytest.mark.usefixtures("small_windows")
def test_a_start_in_the_first_epoch_knows_how_many_rows_came_before(cached, streamed, runs):
    sample = cached(n=30)
    expected = batches(streamed(sample), 9)
    shutil.rmtree(streamed(sample).folder)
    batches(streamed(sample), 5)
    known = streamed(sample)
    assert 24 <= len(known.contexts.tokens) < 80
    runs.clear()
    assert_same(batches(known, 4, 5), expected[5:])
    assert 24 < sum(runs) <= 36


def test_mean_scale_and_median_norm_are_those_of_the_sample(cached, streamed):
    sample = cached(n=30)
    stream = streamed(sample)
    assert stream.standardization is sample.standardization
    assert len(stream.contexts.tokens) == 0
    batch = batches(stream, 1)[0]
    assert len(stream.contexts.tokens) == 80
    raw = cached()
    assert torch.isin(batch.sum(1), sample.standardization(raw.rows(raw.content)).sum(1)).all()
    norms = raw.norms[:, 0]
    assert torch.equal(stream.relative_norms, norms / norms[: 30 * 9][~sample.special].median())
    assert stream.identity["contexts"] != sample.identity["contexts"] == stream.identity["sample"]


@pytest.mark.usefixtures("small_windows")
def test_what_is_damaged_on_the_disk_is_computed_again_with_a_warning(cached, streamed, runs):
    sample = cached(n=30)
    expected = batches(streamed(sample, keeps_own=True), 24)
    folder = streamed(sample).folder
    open_array(folder / "activations.npy")[4] += 1
    runs.clear()
    with pytest.warns(UserWarning, match=r"1 contexts in .*stream are damaged and computed again"):
        assert_same(batches(streamed(sample, keeps_own=True), 24), expected)
    assert runs == [3]
    open_array(folder / "norms.npy")[4] += 1
    with pytest.warns(UserWarning, match=r"the norms of 1 contexts in .*stream are damaged and found again"):
        stream = streamed(sample, keeps_own=True)
    assert_same(batches(stream, 24), expected)
    assert runs == [3, 3]


def test_refusals(cached, streamed, monkeypatch, tiny_model):
    sample = cached(n=30)
    with pytest.raises(ValueError, match=r"a batch of 640 needs as many tokens, but only 639 are content; add text"):
        next(streamed(sample).shuffled(640, 0))
    tuned = copy.deepcopy(tiny_model)
    tuned.W_E.data[0, 0] += 1
    with pytest.raises(
        ValueError, match=r"sample must be of the model that runs, .* got \w+; cache a sample with this"
    ):
        StreamedActivations(tuned, sample.contexts, sample, sample.folder.parent / "tuned")
    with pytest.raises(ValueError, match=r"stream holds something else \(.*sample: .*; choose another folder"):
        streamed(cached(n=20))
    run = tiny_model.run_with_cache

    def infinite(tokens, **kwargs):
        output, cache = run(tokens, **kwargs)
        cache[HOOK].div_(0)
        return output, cache

    monkeypatch.setattr(tiny_model, "run_with_cache", infinite)
    with pytest.raises(ValueError, match=r"contexts 0 to 79: the model's activations at \S+ are not finite"):
        batches(streamed(sample), 1)


def test_the_first_contexts_have_so_many_tokens(contexts):
    assert [len(first_contexts(contexts, n, [0]).tokens) for n in (1, 8, 9, 640, 1000)] == [1, 1, 2, 80, 80]
