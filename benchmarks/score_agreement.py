"""Do scores of explanations agree, and what changes with seed, text and judge? On a run of bae-lens demo.

python benchmarks/score_agreement.py demo
bae-lens agreement score_agreement/* --output score_agreement_page
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from bae_lens.activations.contexts import held_out_documents
from bae_lens.activations.models import load_model
from bae_lens.activations.sources import load_text
from bae_lens.cli.scored import AnalyzedRun
from bae_lens.comsem import ComSem, CorpusSettings, OfflineJudge
from bae_lens.comsem.agreement import compare_scores
from bae_lens.comsem.exports import RESULT_FILE, save
from bae_lens.comsem.results import ComSemReport
from bae_lens.comsem.scores.catalog import SCORES
from bae_lens.storage import read_json, validated

HALVES = ("first half", "second half")


@dataclass(frozen=True)
class ScoreAgreement:
    """All scores of the same features on both halves of the held-out documents, with another seed and another judge."""

    run_folder: tyro.conf.Positional[Path]
    """That bae-lens demo has written."""
    output: Path = Path("score_agreement")
    """A folder for each run of ComSem; one that is there is not made again."""
    dictionaries: tuple[str, ...] = ("BAE", "Top-k", "ReLU")
    n_features: int = 46
    """Drawn at random, the same of each dictionary; a few are activated by too few tokens."""
    tokens: int = 16_384

    def run(self) -> None:
        run = validated(AnalyzedRun, read_json(self.run_folder / "run.json"), "run.json")
        model = load_model(run.model, "cpu", run.contexts["context_size"])
        documents = list(held_out_documents(load_text(run.dataset, run.text_column, run.dataset_split), run.seed))
        saes = {name: self.run_folder / "dictionaries" / name for name in self.dictionaries}
        d_sae = read_json(saes[self.dictionaries[0]] / "cfg.json")["d_sae"]
        features = tuple(random.Random(0).sample(range(d_sae), self.n_features))
        runs: tuple[tuple[int, int, str, Callable[[], OfflineJudge]], ...] = (
            (0, 0, "", OfflineJudge),
            (1, 0, "", OfflineJudge),
            (0, 1, "", OfflineJudge),
            (0, 0, ", no tagger", without_parts_of_speech),
        )
        reports = {}
        for half, seed, other, make_judge in runs:
            name = f"{HALVES[half]}, seed {seed}{other}"
            path = self.output / name / RESULT_FILE
            if not path.exists():
                comsem = ComSem(
                    make_judge(),
                    corpus=CorpusSettings(tokens=self.tokens, context_size=run.contexts["context_size"]),
                    features=features,
                    scores=tuple(SCORES),
                    explanation_controls=True,
                    baseline_features=16,
                    accept_failing_judge=True,
                    seed=seed,
                )
                report = comsem.score(model, saes, documents[half::2])
                text = f"{run.dataset}, {HALVES[half]} of the held-out documents"
                save(replace(report, model=run.model, dataset=text), path.parent)
            reports[name] = ComSemReport.from_dict(read_json(path))
            print(f"{name}\n{reports[name].table()}\n", flush=True)
        print(compare_scores(reports).table())


def without_parts_of_speech() -> OfflineJudge:
    """The offline judge with a tagger that knows nothing: meanings, form, place and neighbors are left."""
    judge = OfflineJudge(tag=lambda texts: [(text, text, "") for text in texts])
    judge.name = "offline, without parts of speech"
    return judge


if __name__ == "__main__":
    tyro.cli(ScoreAgreement).run()
