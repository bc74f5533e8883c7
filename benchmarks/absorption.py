r"""Feature absorption by SAEBench 0.6.0 (arXiv 2409.14507): is a letter's feature silent where a word's speaks for it?

In the environment of `sparse_probing.py`, on its comparison:

pip install --no-deps sae-bench==0.6.0 tabulate
python benchmarks/absorption.py --runs runs/probing --output runs/absorption

Prompts, probes, features of a letter and both measures are SAEBench's own functions, and what they hold constant stays,
but for how many words there are, with how many examples each, and in what batches the sparse probes learn. What is
finished is kept; the same command goes on.
"""
# pyright: reportMissingImports=false

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import tyro
from interval import mean_and_difference
from machine import machine
from random_features import random_features
from sae_bench.evals.absorption import common, feature_absorption, feature_absorption_calculator, probing
from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig
from sae_bench.evals.absorption.feature_absorption import run_feature_absortion_experiment
from sae_bench.evals.absorption.k_sparse_probing import run_k_sparse_probing_experiment
from sae_bench.evals.absorption.main import _aggregate_results_df
from sae_bench.evals.absorption.prompting import SpellingPrompt, create_icl_prompt
from sae_bench.evals.absorption.vocab import LETTERS, get_alpha_tokens
from sae_lens import SAE, HookedSAETransformer
from torch import Tensor
from tqdm import tqdm

from bae_lens import BAE, BAEConfig, CachedActivations, load_demo_model
from bae_lens.activations.hook_names import check_different
from bae_lens.saes.loading import load_dictionary
from bae_lens.storage import RUN_FILE, claimed, read_json, write_json

DEFAULTS = AbsorptionEvalConfig()
EXAMPLES = 10  # in SAEBench's prompts
BATCH = 64  # prompts through the model at once
WORDS_OF_A_LETTER = 5  # at least, so that there are some to learn from
MEASURES = {
    "F1 of 1 feature": "f1_sparse_sae_1",
    "features of a letter": "num_split_feats",
    "absorption fraction": "mean_absorption_fraction",
    "full absorption": "full_absorption_rate",
}


class UnitDecoder:
    """A dictionary whose decoder rows have norm 1 and whose activations take up their norms, as SAEBench's absorption
    supposes: it multiplies an activation with a cosine. A code of 0 and 1 holds all its strength in the decoder.
    """

    def __init__(self, sae: SAE[Any]) -> None:
        self.sae = sae
        self.norms = sae.W_dec.detach().norm(dim=1).clamp(min=1e-8)
        self.W_dec = sae.W_dec.detach() / self.norms[:, None]

    def encode(self, x: Tensor) -> Tensor:
        feature_acts = self.sae.encode(x)
        return (feature_acts.to_dense() if feature_acts.is_sparse else feature_acts) * self.norms

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sae, name)


class Reader:
    """What SAEBench asks of a model: states of prompts at one hook. No prompt is read twice, or beyond the hook."""

    def __init__(self, model: HookedSAETransformer, hook: str) -> None:
        self.model, self.hook = model, hook
        self.states: dict[str, Tensor] = {}

    @property
    def layer(self) -> int:
        return int(self.hook.split(".")[1])

    def run_with_cache(self, prompts: list[str], names_filter: list[str]) -> tuple[None, dict[str, Tensor]]:
        new = [prompt for prompt in prompts if prompt not in self.states]
        if new:
            cache = self.model.run_with_cache(new, names_filter=names_filter, stop_at_layer=self.layer + 1)[1]
            self.states.update(zip(new, cache[self.hook], strict=True))
        return None, {self.hook: torch.stack([self.states[prompt] for prompt in prompts])}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


@dataclass(frozen=True)
class Absorption:
    """What is asked, of which dictionaries."""

    runs: tuple[Path, ...]
    """Folders of `bae-lens compare`, each with its own hook, the residual stream after a layer."""
    output: Path
    """Folder for probes, features and results."""
    words: int = 4000
    """A seeded sample of the vocabulary's tokens of letters alone; SAEBench takes all. Probes learn from 4 in 5."""
    examples: int = 2
    """Words with their first letters that a prompt begins with; SAEBench takes 10."""
    sparse_batch: int = 320
    """Words of a step of the sparse probes' training; 10 steps an epoch, as with SAEBench's 4096 of all words."""
    asked: int = 96
    """Words whose first letter the model itself is asked for, after `examples` and after 10 others."""
    seed: int = 42
    """Of words, prompts and probes."""
    summary: Path = field(default=Path(__file__).parent / "results" / "absorption.json")

    def run(self) -> None:
        runs = [read_json(folder / RUN_FILE) for folder in self.runs]
        hooks = [str(run["hook_name"]) for run in runs]
        check_different(hooks)
        for hook in hooks:
            if not hook.endswith("hook_resid_post"):
                raise ValueError(f"SAEBench reads absorption after a layer, at hook_resid_post, got a run at {hook}")
        settings = {name: value for name, value in asdict(self).items() if name not in ("runs", "output", "summary")}
        with claimed(self.output, {**settings, "runs": runs}):
            self._run(hooks)

    def _run(self, hooks: list[str]) -> None:
        model = load_demo_model()
        words = self._words(model)
        with self._scaled(words):
            spelled = self._once("spelled.json", lambda: self._spelled(model, words))
            print(f"first letters that the model says, by examples: {spelled}", flush=True)
            results = {}
            for folder, hook in zip(self.runs, hooks, strict=True):
                reader = Reader(model, hook)
                results[hook] = {
                    name: self._once(f"{hook}/{name}.json", lambda: self._measured(reader, name, sae))  # noqa: B023
                    for name, sae in _dictionaries(folder, hook)
                }
                print(f"\n{hook}\n\n{_table(results[hook])}", flush=True)
        write_json(self.summary, {**machine(), "words": len(words), "spelled": spelled, "by_letter": results})

    def _once(self, file: str, measure: Callable[[], Any]) -> Any:
        path = self.output / file
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, measure())
        return read_json(path)

    def _words(self, model: HookedSAETransformer) -> list[str]:
        words = sorted(get_alpha_tokens(model.tokenizer))  # its own order is another one in every process
        if len(words) < self.words:
            raise ValueError(
                f"the vocabulary has {len(words)} tokens of letters alone, {self.words} were asked for; ask for fewer"
            )
        print(f"{self.words} of {len(words)} words")
        sample = random.Random(self.seed).sample(words, self.words)
        of_letter = Counter(word.strip()[0].lower() for word in sample)
        rarest = min(LETTERS, key=lambda letter: of_letter[letter])
        if of_letter[rarest] < WORDS_OF_A_LETTER:
            raise ValueError(
                f"probes take {WORDS_OF_A_LETTER} words of every letter at least, and {self.words} words have "
                f"{of_letter[rarest]} of {rarest}; ask for more"
            )
        return sample

    @contextmanager
    def _scaled(self, words: list[str]) -> Iterator[None]:
        """SAEBench with these words and so many examples, neither of which it takes."""
        with ExitStack() as patches:
            for module in (common, feature_absorption):
                patches.enter_context(mock.patch.object(module, "get_alpha_tokens", return_value=words))
            for module in (probing, feature_absorption_calculator):
                patches.enter_context(mock.patch.object(module, "create_icl_prompt", self._prompt))
            yield

    def _prompt(self, word: str, examples: list[str], **options: Any) -> SpellingPrompt:
        return create_icl_prompt(word, examples, **{**options, "max_icl_examples": self.examples})

    @torch.no_grad()
    def _spelled(self, model: HookedSAETransformer, words: list[str]) -> dict[int, float]:
        """Share of words whose first letter is the likeliest next token, by the number of examples."""
        shares = {}
        for examples in sorted({self.examples, EXAMPLES}):
            random.seed(self.seed)
            options = {"max_icl_examples": examples, "prepend_separator_to_first_example": True}
            prompts = [
                create_icl_prompt(word, words, DEFAULTS.prompt_template, **options) for word in words[: self.asked]
            ]
            right = 0
            for start in tqdm(range(0, len(prompts), BATCH), f"{examples} examples"):
                batch = prompts[start : start + BATCH]
                answers = model([prompt.base for prompt in batch])[:, -1].argmax(1)
                said = model.to_string(answers[:, None])
                right += sum(letter == prompt.answer for letter, prompt in zip(said, batch, strict=True))
            shares[examples] = round(right / len(prompts), 4)
        return shares

    def _measured(self, reader: Reader, name: str, sae: UnitDecoder) -> dict[str, dict[str, float]]:
        """By letter: F1 of the probe of the states and of sparse probes, and both measures of absorption."""
        folder = self.output / reader.hook / "saebench"
        sparse, absorbed = folder / "k_sparse_probing", folder / "feature_absorption"
        common_settings = {
            "model": reader,
            "sae": sae,
            "layer": reader.layer,
            "sae_name": name,
            "max_k_value": DEFAULTS.max_k_value,
            "prompt_template": DEFAULTS.prompt_template,
            "prompt_token_pos": DEFAULTS.prompt_token_pos,
            "device": "cpu",
            "probes_dir": self.output / "probes",
        }
        self._reseed()
        letters = run_k_sparse_probing_experiment(
            **common_settings,
            experiment_dir=sparse,
            f1_jump_threshold=DEFAULTS.f1_jump_threshold,
            k_sparse_probe_l1_decay=DEFAULTS.k_sparse_probe_l1_decay,
            k_sparse_probe_batch_size=self.sparse_batch,
            k_sparse_probe_num_epochs=DEFAULTS.k_sparse_probe_num_epochs,
            precalc_k_sparse_probe_sae_acts=True,
        ).set_index("letter")
        self._reseed()  # the same prompts for all dictionaries
        words = run_feature_absortion_experiment(
            **common_settings,
            experiment_dir=absorbed,
            sparse_probing_experiment_dir=sparse,
            feature_split_f1_jump_threshold=DEFAULTS.f1_jump_threshold,
            batch_size=BATCH,
        )
        by_letter = _aggregate_results_df(words).set_index("letter").join(letters, rsuffix="_")
        columns = ["f1_probe", "num_probe_true_positives", *MEASURES.values()]
        return {
            str(letter): {column: round(float(row[column]), 4) for column in columns}
            for letter, row in by_letter.iterrows()
        }

    def _reseed(self) -> None:
        random.seed(self.seed)
        torch.manual_seed(self.seed)


def _dictionaries(folder: Path, hook: str) -> Iterator[tuple[str, UnitDecoder]]:
    for path in sorted((folder / "dictionaries").iterdir()):
        yield path.name, UnitDecoder(load_dictionary(path))
    yield "random features", UnitDecoder(_random_features(CachedActivations(folder / "activations" / "train", hook)))


@torch.no_grad()
def _random_features(train: CachedActivations) -> BAE:
    """They as a dictionary, found on the tokens that the others were trained on, with the decoder of least squares."""
    x = train.rows(train.content[:: -(-len(train.content) // 32_768)])
    bae = BAE(BAEConfig(d_in=train.d_in, d_sae=4 * train.d_in))
    mean = x.mean(0)
    directions, threshold = random_features(x, bae.cfg.d_sae)
    code = ((x - mean) @ directions >= threshold).float()
    rate = code.mean(0)
    bae.W_enc.data, bae.b_enc.data = directions, -threshold - mean @ directions
    bae.W_dec.data = torch.linalg.lstsq(code - rate, x - mean).solution
    bae.b_dec.data = mean - rate @ bae.W_dec
    return bae


def _table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Means over the letters that the probe of the states tells, and 95 % intervals of the difference to the BAE's."""
    f1 = {letter: row["f1_probe"] for letter, row in results["BAE"].items()}
    told = [letter for letter, value in f1.items() if value > DEFAULTS.min_GT_probe_f1]
    lines = [
        f"F1 of the probe: {', '.join(f'{letter} {value:.2f}' for letter, value in f1.items())}; over "
        f"{DEFAULTS.min_GT_probe_f1} for {len(told)} letters, where SAEBench asks for {DEFAULTS.min_feats_for_eval}\n",
        f"| features | {' | '.join(MEASURES)} |",
        f"| --- |{' ---: |' * len(MEASURES)}",
    ]
    for name, by_letter in results.items():
        cells = [
            mean_and_difference(*([rows[letter][column] for letter in told] for rows in (by_letter, results["BAE"])))
            for column in MEASURES.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    tyro.cli(Absorption).run()
