import dataclasses
import math
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from sae_lens import HookedSAETransformer, StandardSAE, StandardSAEConfig
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.saes.sae import SAEMetadata
from torch.utils._python_dispatch import TorchDispatchMode
from transformer_lens import HookedTransformerConfig

from bae_lens import BinaryTranscoder, BinaryTranscoderConfig
from bae_lens.activations.cache import CachedActivations
from bae_lens.activations.cache_writer import cache_activations
from bae_lens.activations.contexts import PADDING, Contexts
from bae_lens.evaluation import model_loss
from bae_lens.evaluation.model_loss import LanguageModelLoss, LossMeter

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture
def states(states: Any) -> CachedActivations:
    return states[0]


def relu_identity(d: int, hook_name: str = HOOK) -> StandardSAE:
    """Reads every axis in both directions, so that it gives back what it is given."""
    metadata = SAEMetadata(hook_name=hook_name)
    sae = StandardSAE(StandardSAEConfig(d_in=d, d_sae=2 * d, apply_b_dec_to_input=False, metadata=metadata))
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    sae.load_state_dict({"W_enc": both.T, "b_enc": torch.zeros(2 * d), "W_dec": both, "b_dec": torch.zeros(d)})
    return sae


def test_loss_with_a_perfect_dictionary_is_the_models_own(tiny_model, states):
    loss = LossMeter(tiny_model, states, n_contexts=50)({"identity": relu_identity(16)})["identity"]
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
    loss = meter({"shifted": sae})["shifted"]
    assert abs(loss.with_sae - loss.clean) > 1e-3
    _clean, ablated, shifted = seen
    assert (ablated[meter.content] == 0).all()
    assert torch.equal(ablated[~meter.content], cache[HOOK][~meter.content])
    shift = shifted - cache[HOOK]
    assert torch.allclose(shift[meter.content][:, 3], torch.tensor(7.0), atol=1e-5)
    assert (shift[~meter.content] == 0).all()
    assert not meter.content[:, 0].any()


def test_loss_is_measured_on_contexts_spread_over_all(tiny_model, states):
    meter = LossMeter(tiny_model, states, n_contexts=3)
    assert torch.equal(meter.tokens, states.contexts.tokens[[0, 24, 49]])


def test_loss_of_short_documents_is_measured(tiny_model, tmp_path):
    contexts = Contexts(torch.tensor([[0, 5, 6, -1]]), torch.tensor([0]))
    short = cache_activations(tiny_model, contexts, [HOOK], tmp_path / "short")[HOOK]
    assert LossMeter(tiny_model, short, n_contexts=5)({"identity": relu_identity(16)})["identity"].n_tokens == 1


def test_nothing_to_predict_is_refused(tiny_model, tmp_path):
    contexts = Contexts(torch.tensor([[0, 5, -1]]), torch.tensor([0]))
    lonely = cache_activations(tiny_model, contexts, [HOOK], tmp_path / "lonely")[HOOK]
    with pytest.raises(ValueError, match="no held-out token has a next one to predict"):
        LossMeter(tiny_model, lonely, n_contexts=5)


def test_loss_at_hook_z_takes_heads_concatenated(tiny_model, states, tmp_path):
    hook = "blocks.1.attn.hook_z"
    z = cache_activations(tiny_model, states.contexts, [hook], tmp_path / "z")[hook]
    assert LossMeter(tiny_model, z, n_contexts=2)({"identity": relu_identity(16, hook)})[
        "identity"
    ].recovered == pytest.approx(1, abs=1e-2)


@pytest.fixture
def transcoder() -> BinaryTranscoder:
    """From the first layer's MLP input, 16 wide, into the second layer's MLP, 32 wide."""
    metadata = SAEMetadata(hook_name="blocks.0.mlp.hook_in", hook_name_out="blocks.1.mlp.hook_post")
    sae = BinaryTranscoder(BinaryTranscoderConfig(d_in=16, d_sae=64, d_out=32, metadata=metadata))
    sae.W_dec.data *= 0.3
    sae.b_enc.data.normal_()  # without it the code would not depend on the scale of the input
    sae.b_dec.data.normal_()
    return sae


def test_loss_and_divergence_of_one_context_by_hand(tiny_model, states):
    sae = relu_identity(16)
    sae.W_dec.data *= 0.4
    sae.b_dec.data.normal_()
    meter = LossMeter(tiny_model, states, n_contexts=1)
    assert meter.content.tolist() == [[False] + [True] * (int((meter.tokens != PADDING).sum()) - 1)]
    loss = meter({"sae": sae})["sae"]

    clean, (spliced, zeroed) = (
        tiny_model(meter.tokens)[0],
        (
            tiny_model.run_with_hooks(meter.tokens, fwd_hooks=[(HOOK, hook)])[0]
            for hook in (
                lambda x, hook: torch.cat([x[:, :1], sae(x[:, 1:])], dim=1),  # noqa: ARG005
                lambda x, hook: torch.cat([x[:, :1], torch.zeros_like(x[:, 1:])], dim=1),  # noqa: ARG005
            )
        ),
    )
    tokens = meter.tokens[0]
    log_p, log_q, log_0 = (logits.double().log_softmax(-1)[1:-1] for logits in (clean, spliced, zeroed))
    rows = torch.arange(len(log_p))

    assert loss.n_tokens == len(tokens) - 2
    assert loss.clean == pytest.approx(-log_p[rows, tokens[2:]].mean().item(), rel=1e-5)
    assert loss.with_sae == pytest.approx(-log_q[rows, tokens[2:]].mean().item(), rel=1e-5)
    assert loss.ablated == pytest.approx(-log_0[rows, tokens[2:]].mean().item(), rel=1e-5)
    assert loss.kl_with_sae == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-4)
    assert loss.kl_ablated == pytest.approx((log_p.exp() * (log_p - log_0)).sum(-1).mean().item(), rel=1e-4)
    assert loss.recovered == (loss.ablated - loss.with_sae) / (loss.ablated - loss.clean)
    assert loss.kl_recovered == 1 - loss.kl_with_sae / loss.kl_ablated


def test_transcoder_writes_at_its_output_hook_what_it_makes_of_its_input(tiny_model, states, transcoder):
    meter = LossMeter(tiny_model, states, n_contexts=5)
    loss = meter({"transcoder": transcoder})["transcoder"]

    tokens, metadata = meter.tokens.clamp(min=0), transcoder.cfg.metadata
    _, cache = tiny_model.run_with_cache(tokens)
    out = torch.where(meter.content[..., None], transcoder(cache[metadata.hook_name]), cache[metadata.hook_name_out])
    logits = tiny_model.run_with_hooks(tokens, fwd_hooks=[(metadata.hook_name_out, lambda x, hook: out)])  # noqa: ARG005
    following = logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    assert loss.with_sae == pytest.approx(-following[meter.scored].mean().item(), rel=1e-5)

    zeros = torch.where(meter.content[..., None], 0.0, cache[metadata.hook_name_out])
    logits = tiny_model.run_with_hooks(tokens, fwd_hooks=[(metadata.hook_name_out, lambda x, hook: zeros)])  # noqa: ARG005
    following = logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    assert loss.ablated == pytest.approx(-following[meter.scored].mean().item(), rel=1e-5)
    assert loss.ablated != pytest.approx(loss.clean, rel=1e-4)


def test_several_dictionaries_share_the_clean_pass_and_the_ablation_of_their_hook(
    tiny_model, states, transcoder, monkeypatch
):
    monkeypatch.setattr(model_loss, "TOKENS_PER_PASS", 3 * 16)
    meter = LossMeter(tiny_model, states, n_contexts=6)
    worse = relu_identity(16)
    worse.W_dec.data *= 0.4
    saes = {"good": relu_identity(16), "worse": worse, "transcoder": transcoder}
    alone = {name: meter({name: sae})[name] for name, sae in saes.items()}
    run, hooked = tiny_model.run_with_hooks, []

    def counted(*args, fwd_hooks, **kwargs):
        hooked.append([name for name, _ in fwd_hooks])
        return run(*args, fwd_hooks=fwd_hooks, **kwargs)

    monkeypatch.setattr(tiny_model, "run_with_hooks", counted)
    together = meter(saes)
    assert together == alone
    assert together["good"].with_sae != together["worse"].with_sae
    out = transcoder.cfg.metadata.hook_name_out
    clean, spliced = ["blocks.0.hook_resid_pre"], [transcoder.cfg.metadata.hook_name, out]
    passes = [clean, [HOOK], [out], [HOOK, HOOK], [HOOK, HOOK], spliced]
    assert hooked == passes * 2


def test_loss_is_the_same_whatever_is_made_at_a_time(tiny_model, states, transcoder, monkeypatch):
    whole = LossMeter(tiny_model, states, n_contexts=6)({"transcoder": transcoder})["transcoder"]
    monkeypatch.setattr(model_loss, "TOKENS_PER_PASS", 1)
    monkeypatch.setattr(model_loss, "LOGITS_AT_A_TIME", 5 * 64)
    parts = LossMeter(tiny_model, states, n_contexts=6)({"transcoder": transcoder})["transcoder"]
    assert dataclasses.asdict(parts) == pytest.approx(dataclasses.asdict(whole), rel=1e-5)


class Largest(TorchDispatchMode):
    """The most values that each operation made at a time, of tensors as wide as the vocabulary."""

    def __init__(self, d_vocab: int) -> None:
        super().__init__()
        self.d_vocab, self.sizes = d_vocab, Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.shape[-1:] == (self.d_vocab,):
            name = str(function.overloadpacket)
            self.sizes[name] = max(self.sizes[name], made.numel())
        return made


def test_no_more_logits_are_made_at_a_time_than_of_a_thousand_tokens(tiny_tokenizer, states, monkeypatch):
    """Whatever the length of contexts and the vocabulary; of probabilities, no more than are asked for."""
    tiny_model = wide_model(tiny_tokenizer)
    states = cache_activations(tiny_model, states.contexts, [HOOK], states.folder.with_name("wide"))[HOOK]
    monkeypatch.setattr(model_loss, "TOKENS_PER_PASS", 40)  # two contexts of 16
    monkeypatch.setattr(model_loss, "LOGITS_AT_A_TIME", 7 * 1009)
    meter = LossMeter(tiny_model, states, n_contexts=12)
    alive: list[weakref.ref] = []
    most = 0

    def count(_module: Any, _given: Any, logits: torch.Tensor) -> None:
        nonlocal most
        alive.append(weakref.ref(logits))
        most = max(most, sum(each() is not None for each in alive))

    tiny_model.unembed.register_forward_hook(count)
    with Largest(1009) as largest:
        meter({"one": relu_identity(16), "two": relu_identity(16)})
    assert len(alive) == 6 * 4  # the clean pass, that with zeros, and one for each dictionary
    assert most == 1  # of the clean ones, only the log-probabilities at scored tokens are kept
    assert largest.sizes.pop("aten._log_softmax") == 7 * 1009
    assert max(largest.sizes.values()) == 2 * 16 * 1009


def wide_model(tokenizer: Any) -> HookedSAETransformer:
    """A vocabulary that is the largest of all sizes, as it is in real models."""
    cfg = HookedTransformerConfig(
        n_layers=1,
        d_model=16,
        n_ctx=32,
        d_head=8,
        n_heads=2,
        d_mlp=32,
        d_vocab=1009,
        act_fn="gelu",
        seed=0,
        device="cpu",
    )
    return HookedSAETransformer(cfg, tokenizer=tokenizer)


def test_nothing_is_recovered_where_zeros_make_no_difference(tiny_model, tmp_path, states):
    tiny_model.blocks[1].mlp.W_out.data.zero_()
    hook = "blocks.1.mlp.hook_post"
    post = cache_activations(tiny_model, states.contexts, [hook], tmp_path / "post")[hook]
    loss = LossMeter(tiny_model, post, n_contexts=3)({"sae": relu_identity(32, hook)})["sae"]
    assert loss.clean == loss.with_sae == loss.ablated
    assert math.isnan(loss.recovered)
    assert math.isnan(loss.kl_recovered)


def test_share_recovered_by_hand():
    loss = LanguageModelLoss(10, clean=2.0, with_sae=2.5, ablated=7.0, kl_with_sae=0.4, kl_ablated=4.0)
    assert (loss.recovered, loss.kl_recovered) == (0.9, 0.9)


def test_hook_that_is_not_reached_is_not_taken_for_a_perfect_dictionary(tiny_model, states, monkeypatch):
    meter, run = LossMeter(tiny_model, states, n_contexts=2), tiny_model.run_with_hooks

    def without(*args, fwd_hooks, **kwargs):
        return run(*args, fwd_hooks=[hook for hook in fwd_hooks if hook[0] != HOOK], **kwargs)

    monkeypatch.setattr(tiny_model, "run_with_hooks", without)
    with pytest.raises(ValueError, match=f"nothing can be put at {HOOK}, whose hook the model does not reach"):
        meter({"identity": relu_identity(16)})


def test_layers_below_the_hooks_are_run_once(tiny_model, states, monkeypatch):
    meter = LossMeter(tiny_model, states, n_contexts=4)
    hook = "blocks.1.hook_resid_post"
    saes = {"halved": relu_identity(16, hook), "identity": relu_identity(16, hook)}
    saes["halved"].W_dec.data *= 0.5
    seen = []
    tiny_model.add_hook("blocks.0.hook_resid_pre", lambda x, hook: seen.append(x))  # noqa: ARG005

    shared = meter(saes)
    assert len(seen) == 1
    monkeypatch.setattr(model_loss, "start_layer", lambda *_: None)
    whole = meter(saes)
    assert len(seen) == 1 + 4
    for name in saes:
        assert dataclasses.asdict(shared[name]) == pytest.approx(dataclasses.asdict(whole[name]), rel=1e-5, abs=1e-6)


def test_standard_error_of_a_ratio_by_hand():
    error = model_loss.ratio_error(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]))
    assert error == pytest.approx(0.5)  # ratios 1/2 and 3/2 of equal weight: their standard deviation over sqrt(2)


def test_standard_error_of_a_ratio_is_that_of_repeated_draws():
    denominator = 1 + torch.rand(4000, 50)
    numerator = 0.8 * denominator + 0.2 * torch.randn(4000, 50)
    errors = torch.tensor([model_loss.ratio_error(*pair) for pair in zip(numerator, denominator, strict=True)])
    assert errors.mean() == pytest.approx((numerator.sum(1) / denominator.sum(1)).std().item(), rel=0.05)


def test_one_context_has_no_standard_error():
    assert model_loss.ratio_error(torch.ones(1), torch.ones(1)) is None


@pytest.mark.filterwarnings("ignore:run_with_cache. skipped:UserWarning")
def test_bridge_on_which_a_dictionary_was_attached_is_refused_or_measured_right(tiny_model_folder, states, tmp_path):
    """After `run_with_saes` the hooks of a bridge may be reached by none of `run_with_hooks`, in silence."""
    bridge = SAETransformerBridge.boot_transformers(str(tiny_model_folder), device="cpu")
    hook = "blocks.0.hook_out"
    cached = cache_activations(bridge, states.contexts, [hook], tmp_path / "bridge")[hook]
    sae = relu_identity(16, hook)
    sae.b_dec.data[3] = 7
    meter = LossMeter(bridge, cached, n_contexts=3)
    expected = meter({"it": sae})["it"]
    assert expected.kl_with_sae > 1e-3
    bridge.run_with_saes(torch.tensor([[5, 6, 7]]), saes=[relu_identity(16, hook)], prepend_bos=False)
    try:
        found = meter({"it": sae})["it"]
    except ValueError as error:
        assert "load the model anew" in str(error)  # noqa: PT017
    else:
        assert found == expected
