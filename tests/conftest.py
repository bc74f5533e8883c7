import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest-xdist has a process for each core

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import shadow_device
import torch
from datasets import Dataset
from sae_lens import HookedSAETransformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens import HookedTransformerConfig
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bae_lens import BAE, BAEConfig, TrainingBAEConfig
from bae_lens.activations import models as language_models
from bae_lens.activations.cache import CachedActivations
from bae_lens.activations.cache_writer import cache_activations
from bae_lens.activations.contexts import Contexts, ContextSettings, choose_contexts
from bae_lens.activations.paired import PairedActivations
from bae_lens.comparison.experiment import Experiment
from bae_lens.comparison.results import Comparison, Corpus, DictionaryResult, Run, Trial
from bae_lens.evaluation.features import FeatureDashboard, Neighbor, TokenInContext
from bae_lens.evaluation.metrics import CodeMetrics, DictionaryMetrics, OptimizedCode
from bae_lens.evaluation.model_loss import LanguageModelLoss
from bae_lens.functional.rate_distortion import RatePoint
from bae_lens.storage import Stage
from bae_lens.training.recipe import TrainingSettings

shadow_device.register()  # before any gradient: from the first on, torch knows of no other devices

SPECIAL_TOKENS = ("<bos>", "<eos>", "<pad>", "<unk>")
WORDS = tuple(f"w{i}" for i in range(60))
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_memory_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are compared with transformers in each test, and nothing is written into the user's cache."""
    monkeypatch.setattr(language_models, "cache_folder", lambda: tmp_path.with_name(f"{tmp_path.name}_models"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For small tensors, on which threads cost more than they save."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def golden() -> Path:
    """Values computed by the paper's authors' published code in float64, and their checkpoints of the same models."""
    return GOLDEN


@pytest.fixture
def bae_config() -> Callable[..., TrainingBAEConfig]:
    """Makes a small config; keywords override its fields."""

    def make(**overrides: Any) -> TrainingBAEConfig:
        return TrainingBAEConfig(
            **{
                "d_in": 16,
                "d_sae": 64,
                "encoder_bias_init": -0.5,
                **overrides,
            }
        )

    return make


@pytest.fixture
def identity_bae() -> Callable[[int], BAE]:
    """Makes a BAE that reads and writes non-negative axes: feature j is on where x_j >= 1/2."""

    def make(d: int) -> BAE:
        bae = BAE(BAEConfig(d_in=d, d_sae=d))
        bae.load_state_dict(
            {
                "W_enc": torch.eye(d),
                "b_enc": torch.full((d,), -0.5),
                "W_dec": torch.eye(d),
                "b_dec": torch.zeros(d),
                "prior": torch.zeros(d),
                "bit_price": torch.tensor(torch.nan),
            }
        )
        return bae

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """A tokenizer of 60 words, loaded from a folder: TransformerLens wants to know where a tokenizer comes from."""
    folder = tmp_path_factory.mktemp("tiny_tokenizer")
    vocabulary = {token: index for index, token in enumerate(SPECIAL_TOKENS + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture
def tiny_model(tiny_tokenizer: PreTrainedTokenizerFast) -> HookedSAETransformer:
    """A random transformer: 2 layers, 16 wide, 2 heads, 64 words."""
    cfg = HookedTransformerConfig(
        n_layers=2,
        d_model=16,
        n_ctx=32,
        d_head=8,
        n_heads=2,
        d_mlp=32,
        d_vocab=len(tiny_tokenizer),
        act_fn="gelu",
        seed=0,
        device="cpu",
    )
    return HookedSAETransformer(cfg, tokenizer=tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_dataset() -> Dataset:
    """8192 texts of random words, more than any test trains on."""
    generator = random.Random(0)
    return Dataset.from_dict({"text": [" ".join(generator.choices(WORDS, k=24)) for _ in range(8192)]})


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random Llama of transformers with its tokenizer, as `save_pretrained` writes them."""
    folder = tmp_path_factory.mktemp("tiny_model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=SPECIAL_TOKENS.index("<bos>"),
        eos_token_id=SPECIAL_TOKENS.index("<eos>"),
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_contexts(tiny_tokenizer: PreTrainedTokenizerFast, tiny_dataset: Dataset) -> dict[str, Contexts]:
    """600 tokens for training and 300 held-out ones, in contexts of 16."""
    settings = ContextSettings(context_size=16, cached_tokens=600, held_out_tokens=300)
    return choose_contexts(tiny_tokenizer, tiny_dataset, settings)


@pytest.fixture
def states(
    tiny_model: HookedSAETransformer, tiny_contexts: dict[str, Contexts], tmp_path: Path
) -> tuple[CachedActivations, CachedActivations]:
    """Training and held-out tokens after the first layer of the tiny model."""
    hook = "blocks.0.hook_resid_post"
    train, test = (
        cache_activations(tiny_model, tiny_contexts[split], [hook], tmp_path / "states" / split)[hook]
        for split in ("train", "test")
    )
    return train, test


@pytest.fixture
def pairs(tiny_model: HookedSAETransformer, tiny_contexts: dict[str, Contexts], tmp_path: Path) -> PairedActivations:
    """The training tokens at the input of the second layer's MLP, 16 wide, and inside it, 32 wide."""
    hooks = ["blocks.1.mlp.hook_in", "blocks.1.mlp.hook_post"]
    return PairedActivations(*cache_activations(tiny_model, tiny_contexts["train"], hooks, tmp_path / "pairs").values())


@pytest.fixture(scope="session")
def make_comparison() -> Callable[..., Comparison]:
    """Makes a comparison that nobody measured, of any size: every part of a result is there, with plausible values."""

    def make(
        names: tuple[str, ...] = ("Top-k", "BAE", "Transcoder"),
        seeds: tuple[int, ...] = (0, 1),
        n_features: int = 4,
        d_sae: int = 64,
        n_trials: int = 3,
    ) -> Comparison:
        random_values = random.Random(0)
        curve = [RatePoint(50.0 * i, 1 - 0.8**i) for i in range(1, 13)]
        corpus = Corpus(50, 600, 50, 3, 17.5, ["\n", "<b>"])
        return Comparison(
            Experiment(
                "tiny",
                "words",
                "blocks.0.hook_resid_post",
                training=TrainingSettings(training_tokens=640, batch_size=32),
                l0=8.0,
                seeds=seeds,
            ),
            corpus,
            corpus,
            [Stage("activations", 12.5, 0.5), Stage("train BAE", 2.5, 1.5)],
            curve,
            [RatePoint(point.bits, point.explained_variance + 0.02) for point in curve],
            [RatePoint(70.0 * i, 0.08 * i) for i in range(1, 9)],
            [_made_dictionary(name, random_values, seeds, n_features, d_sae, n_trials) for name in names],
        )

    return make


@pytest.fixture(scope="session")
def comparison(make_comparison: Callable[..., Comparison]) -> Comparison:
    """Two seeds of an SAE, a binary autoencoder and a transcoder, each chosen from three trials."""
    return make_comparison()


def _made_dictionary(
    name: str, values: random.Random, seeds: tuple[int, ...], n_features: int, d_sae: int, n_trials: int
) -> DictionaryResult:
    is_binary, is_transcoder = name == "BAE", name == "Transcoder"
    trials = [
        Trial({"lr": 10.0**-i, "d_sae": d_sae}, 0.5 + values.random() / 10, 4.0 * (i + 1), 100.0 + i)
        for i in range(n_trials)
    ]
    return DictionaryResult(
        name=name,
        architecture="bae" if is_binary else "transcoder" if is_transcoder else "topk",
        hook_name="blocks.0.mlp.hook_in" if is_transcoder else "blocks.0.hook_resid_post",
        hook_name_out="blocks.0.hook_mlp_out" if is_transcoder else "blocks.0.hook_resid_post",
        d_sae=d_sae,
        trials=trials,
        recipe={"lr": 0.1, "d_sae": d_sae},
        runs=[_made_run(seed, values, is_binary, d_sae) for seed in seeds],
        features=[_made_dashboard(index, n_features, values, is_transcoder) for index in range(n_features)],
    )


def _made_run(seed: int, values: random.Random, is_binary: bool, d_sae: int) -> Run:
    rates = [0.0, *(10 ** values.uniform(-4, -0.5) for _ in range(d_sae - 1))]
    l0, explained_variance, support_bits = sum(rates), 0.7 + values.random() / 10, 150.0 + 10 * values.random()
    curve = [RatePoint(support_bits + 40.0 * i, explained_variance - 0.08 / 2**i) for i in range(8)]
    code = CodeMetrics(600, l0, l0, support_bits, 0.8 * support_bits, 1, 0, 5, d_sae - 3, rates)
    value_bits, value_curve = (0.0, []) if is_binary else (120.0, curve)
    better = [RatePoint(bits, explained + 0.03) for bits, explained in value_curve]
    optimized = OptimizedCode(code, explained_variance + 0.03, value_bits, better)
    return Run(
        seed=seed,
        training_seconds=50 + 10 * values.random(),
        memory_gib=1.5,
        curve=[{"step": step, "l0": l0, "mse_loss": 100 / (step + 1)} for step in range(200)],
        metrics=DictionaryMetrics(
            code=code,
            explained_variance=explained_variance,
            mean_squared_error=12.5,
            cosine_similarity=0.9,
            l2_ratio=0.95,
            value_bits=value_bits,
            value_curve=value_curve,
            is_binary=is_binary,
            optimized=optimized,
            refitted=None if is_binary else optimized,
        ),
        language_model=LanguageModelLoss(500, 2.0, 2.2 + values.random() / 10, 10.0, 0.3, 8.0),
    )


def _made_dashboard(index: int, n_features: int, values: random.Random, is_transcoder: bool) -> FeatureDashboard:
    before, after = (" ".join(values.choices(WORDS, k=24)) + " " for _ in range(2))
    return FeatureDashboard(
        feature=3 * index,
        firing_rate=10 ** values.uniform(-3, -1),
        examples=[TokenInContext(before, f"token{index}", after, 9.5 - i) for i in range(8)],
        neighbors=[Neighbor(3 * ((index + 1) % n_features), 0.75), Neighbor(3 * index + 1, 0.25)],
        top_tokens=[] if is_transcoder else [" the", "\n", " of"],
    )
