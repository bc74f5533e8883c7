"""The result of comparisons at several hooks: a few numbers of every dictionary, layer by layer."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bae_lens.comparison.experiment import Experiment
from bae_lens.comparison.results import RESULT_FILE, Comparison, DictionaryResult, Run, over_seeds, unless_pretrained
from bae_lens.markdown import markdown_table
from bae_lens.storage import Stage, validated, write_json


@dataclass(frozen=True)
class HookRow:
    """A dictionary of the comparison at one hook, trained with one seed, measured on held-out documents.

    What its numbers are stands in `Run`, of which they are a part.
    """

    comparison_hook: str
    """The hook of the comparison, whose folder in the run's `hooks` has its name."""
    dictionary: str
    """Name of the dictionary."""
    architecture: str
    """SAELens' name of the architecture."""
    is_binary: bool
    """Whether its features are bits."""
    hook_name: str
    """Where it reads."""
    hook_name_out: str
    """Where it writes; the same unless it is a transcoder."""
    d_sae: int
    """Features that it has."""
    seed: int
    """Of the training."""
    training_seconds: float | None
    """Time spent in optimizer steps; None for a pretrained dictionary."""
    explained_variance: float
    """1 is perfect, 0 is no better than the mean."""
    ce_recovered: float | None
    """Share of the cross entropy that zeros would lose; None where zeros make no difference."""
    kl_recovered: float | None
    """The same for the divergence from the model as it is."""
    l0: float
    """Features that fire per token."""
    informative_l0: float
    """Features per token that differ from what they do most of the time."""
    support_bits: float
    """Bits per token to say which features fire, each coded by itself."""
    joint_bits: float
    """The same, each coded given others, with side information."""
    value_bits: float
    """Bits per token for their values; 0 for a binary code."""
    dead: int
    """Features that fired for no token."""
    always_on: int
    """Features that fired for every token."""
    dense: int
    """Features that fire on over 10 % of the tokens and stay off on over 10 %."""
    feature_activated: int
    """Features among the 10 strongest of at least 8 tokens."""

    @classmethod
    def all_of(cls, comparison: Comparison) -> list["HookRow"]:
        """Of each dictionary and each seed."""
        return [
            cls._of(comparison, dictionary, run) for dictionary in comparison.dictionaries for run in dictionary.runs
        ]

    @classmethod
    def _of(cls, comparison: Comparison, dictionary: DictionaryResult, run: Run) -> "HookRow":
        metrics, code, loss = run.metrics, run.metrics.code, run.language_model
        return cls(
            comparison_hook=comparison.experiment.hook_name,
            dictionary=dictionary.name,
            architecture=dictionary.architecture,
            is_binary=dictionary.is_binary,
            hook_name=dictionary.hook_name,
            hook_name_out=dictionary.hook_name_out,
            d_sae=dictionary.d_sae,
            seed=run.seed,
            training_seconds=run.training_seconds,
            explained_variance=metrics.explained_variance,
            ce_recovered=_known(loss and loss.recovered),
            kl_recovered=_known(loss and loss.kl_recovered),
            l0=code.l0,
            informative_l0=code.informative_l0,
            support_bits=code.support_bits,
            joint_bits=code.joint_bits,
            value_bits=metrics.value_bits,
            dead=code.dead,
            always_on=code.always_on,
            dense=code.dense,
            feature_activated=code.feature_activated,
        )


def _known(share: float | None) -> float | None:
    return None if share is None or math.isnan(share) else share


@dataclass(frozen=True)
class HookComparisons:
    """Comparisons at several hooks of a model in a few numbers; `to_dict` and `from_dict` are inverse to each other.

    All that was found at a hook is the `Comparison` in `result.json` of the hook's own folder.
    """

    experiment: Experiment
    """That of the comparison at the first hook, from which the others differ in `hook_name` alone."""
    train_tokens: int
    """Tokens of content that were cached at each hook."""
    test_tokens: int
    """Tokens on which dictionaries were measured."""
    outlier_tokens: int
    """Of those cached for training, tokens left out at all hooks because of their norm at one."""
    stages: list[Stage]
    """How long what is done once took, then each comparison, by its hook."""
    rows: list[HookRow]
    """By hook in the order in which they were given, by dictionary, and by seed."""

    @property
    def hook_names(self) -> list[str]:
        """In the order in which they were given."""
        return list(dict.fromkeys(row.comparison_hook for row in self.rows))

    @property
    def by_dictionary(self) -> dict[tuple[str, str], list[HookRow]]:
        """The rows of all seeds, by hook and name of the dictionary."""
        grouped: dict[tuple[str, str], list[HookRow]] = {}
        for row in self.rows:
            grouped.setdefault((row.comparison_hook, row.dictionary), []).append(row)
        return grouped

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "HookComparisons":
        """Raises ValueError for what is no result of this version."""
        return validated(cls, content, "this result")

    def save(self, folder: Path) -> Path:
        """Writes `result.json`, whose path it returns."""
        write_json(folder / RESULT_FILE, self, indent=1)
        return folder / RESULT_FILE

    def table(self) -> str:
        """The held-out results as a table in Markdown: the mean over seeds and, after ±, their standard deviation."""
        rows = [[cell(runs) for cell in HOOK_TABLE.values()] for runs in self.by_dictionary.values()]
        return markdown_table(list(HOOK_TABLE), rows, 2)


def share_over_seeds(shares: Sequence[float | None]) -> str:
    """Mean and standard deviation, or a dash where one is not known."""
    known = [share for share in shares if share is not None]
    return over_seeds(known, 3) if len(known) == len(shares) else "-"


# Columns: their headings, and how the rows of one dictionary fill them.
HOOK_TABLE: dict[str, Callable[[list[HookRow]], str]] = {
    "hook": lambda rows: rows[0].comparison_hook,
    "dictionary": lambda rows: rows[0].dictionary,
    "explained variance": lambda rows: over_seeds([row.explained_variance for row in rows], 3),
    "CE recovered": lambda rows: share_over_seeds([row.ce_recovered for row in rows]),
    "L0": lambda rows: over_seeds([row.l0 for row in rows], 1),
    "support bits": lambda rows: over_seeds([row.support_bits for row in rows], 0),
    "value bits": lambda rows: over_seeds([row.value_bits for row in rows], 0),
    "joint bits": lambda rows: over_seeds([row.joint_bits for row in rows], 0),
    "dead": lambda rows: over_seeds([row.dead for row in rows], 0),
    "dense": lambda rows: over_seeds([row.dense for row in rows], 0),
    "Feature Activated": lambda rows: f"{over_seeds([r.feature_activated for r in rows], 0)} of {rows[0].d_sae}",
    "training": lambda rows: unless_pretrained([row.training_seconds for row in rows], 0, "s", "pretrained"),
}
