"""Every hook that is accepted trains, is measured, shown, attached, edited, compressed and loaded again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.evals import EvalConfig
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore

from bae_lens import compress, decompress, edit, run_evals
from bae_lens.activations.contexts import ContextSettings
from bae_lens.comparison.dictionaries import DictionarySpec
from bae_lens.comparison.experiment import Experiment
from bae_lens.comparison.run import compare
from bae_lens.saes.saelens_compat import heads_concatenated
from bae_lens.training.recipe import TrainingSettings

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:the text gave:UserWarning"),
    pytest.mark.filterwarnings("ignore:run_with_cache. skipped:UserWarning"),
    pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale/hook_normalized:UserWarning"),
]
HOOKS = (
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "ln1.hook_normalized",
    "attn.hook_z",
    "mlp.hook_pre",
    "mlp.hook_post",
)
ON_A_BRIDGE = ("attn.hook_q", "attn.hook_k", "attn.hook_v")
PAIRS = (
    ("mlp.hook_in", "hook_mlp_out"),
    ("hook_resid_pre", "mlp.hook_post"),
    ("hook_resid_pre", "hook_resid_post"),
)
REFUSED = ("attn.hook_pattern", "attn.hook_result", "hook_q_input")
EXPERIMENT = Experiment(
    "model",
    "words",
    "",
    contexts=ContextSettings(context_size=16, cached_tokens=400, held_out_tokens=200),
    training=TrainingSettings(training_tokens=320, batch_size=32),
)
EVALS = EvalConfig(
    batch_size_prompts=4,
    n_eval_reconstruction_batches=1,
    n_eval_sparsity_variance_batches=1,
    compute_kl=True,
    compute_ce_loss=True,
    compute_l2_norms=True,
    compute_sparsity_metrics=True,
    compute_variance_metrics=True,
)


@pytest.fixture(params=["hooked", "bridge"])
def model(request: Any, tiny_model: Any, tiny_model_folder: Path) -> Any:
    if request.param == "hooked":
        return tiny_model
    return SAETransformerBridge.boot_transformers(str(tiny_model_folder), device="cpu")


def trained(model: Any, dataset: Dataset, hooks: tuple[str, ...], folder: Path) -> tuple[Any, SAE[Any]]:
    """What `compare` reports of a dictionary, and the dictionary as it is loaded again."""
    hooks = (*(f"blocks.1.{hook}" for hook in hooks),)
    given = dict(zip(("hook_name", "hook_name_out"), hooks, strict=False)) if len(hooks) > 1 else {}
    architecture = "binary_transcoder" if given else "bae"
    spec = DictionarySpec(architecture, {"target_l0": 8.0}, **given)
    contender = spec.contender(model, hooks[0], 2, EXPERIMENT.training.steps)
    experiment = Experiment(**{**vars(EXPERIMENT), "hook_name": hooks[0]})
    (result,) = compare(model, dataset, {"it": contender}, experiment, folder).dictionaries
    return result, SAE.load_from_disk(folder / "dictionaries" / "it")


def make_store(model: Any, sae: SAE[Any], dataset: Dataset) -> ActivationsStore:
    return ActivationsStore.from_sae(
        model=model,
        sae=sae,
        dataset=dataset,
        streaming=False,
        context_size=16,
        store_batch_size_prompts=4,
        n_batches_in_buffer=2,
        train_batch_size_tokens=32,
        total_tokens=1000,
        device="cpu",
    )


def check_use(model: Any, dataset: Dataset, result: Any, sae: SAE[Any]) -> None:
    measured = result.runs[0]
    assert measured.language_model.n_tokens > 0
    tokens = torch.randint(4, 64, (2, 8))

    # evaluated: on the second batch of the store, without special tokens
    store, same = (make_store(model, sae, dataset) for _ in range(2))
    metrics, _ = run_evals(sae, store, model, ActivationScaler(), EVALS)
    same.get_batch_tokens(4)
    batch = same.get_batch_tokens(4)
    _, cache = model.run_with_cache(batch, prepend_bos=False)
    x, y = (cache[hook].flatten(2)[batch > 3] for hook in (result.hook_name, result.hook_name_out))
    with heads_concatenated(sae), torch.no_grad():
        code, error = sae.encode(x), sae(x) - y
    assert metrics["code"]["l0"] == pytest.approx(code.sum(1).mean().item(), rel=1e-5)
    assert metrics["sparsity"]["l0"] == pytest.approx(code.sum(1).mean().item(), rel=1e-5)
    assert metrics["reconstruction_quality"]["mse"] == pytest.approx(error.square().sum(1).mean().item(), rel=1e-4)
    assert metrics["model_performance_preservation"]["ce_loss_with_sae"] > 0

    # attached: the model runs with it, its code is there, and its output with the error is the model's own
    clean = model(tokens, prepend_bos=False)
    with_error = model.run_with_saes(tokens, saes=[sae], use_error_term=True, prepend_bos=False)
    assert torch.allclose(with_error, clean, atol=1e-4)
    sae.use_error_term = False
    attached = model.run_with_saes(tokens, saes=[sae], prepend_bos=False)
    assert not torch.allclose(attached, clean, atol=1e-4)

    # edited: without the error and with no feature changed, the output is that of the attached dictionary
    with edit(model, sae, {}, keep_error=False):
        assert torch.allclose(model(tokens, prepend_bos=False), attached, atol=1e-4)
    with edit(model, sae, {}):
        assert torch.allclose(model(tokens, prepend_bos=False), clean, atol=1e-5)


@pytest.mark.parametrize("hook", HOOKS)
def test_sae(model, tiny_dataset, tmp_path, hook):
    result, sae = trained(model, tiny_dataset, (hook,), tmp_path / "run")
    check_use(model, tiny_dataset, result, sae)
    _, cache = model.run_with_cache(torch.randint(4, 64, (2, 8)), prepend_bos=False)
    x = cache[result.hook_name]
    assert sae(x if sae.hook_z_reshaping_mode else x.flatten(2)).numel() == x.numel()
    sae.turn_off_forward_pass_hook_z_reshaping()
    compress(sae, x.flatten(2), tmp_path / "x.bae")
    assert torch.allclose(decompress(tmp_path / "x.bae", sae), sae(x.flatten(2)).flatten(0, 1), atol=1e-5)


@pytest.mark.parametrize("hook", ON_A_BRIDGE)
def test_heads_other_than_hook_z_are_for_bridges(model, tiny_dataset, tmp_path, hook):
    if isinstance(model, SAETransformerBridge):
        result, sae = trained(model, tiny_dataset, (hook,), tmp_path / "run")
        check_use(model, tiny_dataset, result, sae)
    else:
        with pytest.raises(ValueError, match=f"the heads lie apart at blocks.1.{hook}"):
            trained(model, tiny_dataset, (hook,), tmp_path / "run")
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("hooks", PAIRS)
def test_transcoder(model, tiny_dataset, tmp_path, hooks):
    result, sae = trained(model, tiny_dataset, hooks, tmp_path / "run")
    check_use(model, tiny_dataset, result, sae)


@pytest.mark.parametrize("hook", REFUSED)
def test_what_is_no_vector_a_token_is_refused_before_any_work(model, tiny_dataset, tmp_path, hook):
    with pytest.raises(ValueError, match=r"choose another|has no hook"):
        trained(model, tiny_dataset, (hook,), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("hooks", [("attn.hook_z", "hook_attn_out"), ("hook_resid_pre", "attn.hook_z")])
def test_transcoder_between_heads_and_vectors_is_refused_before_any_work(model, tiny_dataset, tmp_path, hooks):
    with pytest.raises(ValueError, match="a transcoder reads and writes one vector a token"):
        trained(model, tiny_dataset, hooks, tmp_path / "run")
    assert not (tmp_path / "run").exists()
