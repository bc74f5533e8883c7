"""Table 1 of the paper: of each dictionary's features, how many are activated, mean something, and do so always."""

from dataclasses import dataclass

from bae_lens.comsem.judges.measures import jeffreys_interval
from bae_lens.comsem.results import ComSemReport, DictionaryScores
from bae_lens.markdown import markdown_table

HEADINGS = ("dictionary", "Feature Activated", "scored", "score > 0", "score = 1 (share)")


@dataclass(frozen=True)
class Table1Row:
    """A dictionary's features; intervals are Jeffreys' of 95 %, of the share among all that could be scored."""

    name: str
    """Of the dictionary."""
    d_sae: int
    """Features that it has; 0 for random tokens."""
    feature_activated: int
    """Features activated by at least 8 tokens."""
    scoreable: int
    """Features with enough instances to be scored."""
    scored: int
    """Of those, the ones with a score."""
    above_zero: int
    """Of the scored, those with a score over 0."""
    perfect: int
    """Of the scored, those with a score of 1."""

    @property
    def share_above_zero(self) -> float | None:
        """None if nothing was scored."""
        return self.above_zero / self.scored if self.scored else None

    @property
    def share_perfect(self) -> float | None:
        """None if nothing was scored."""
        return self.perfect / self.scored if self.scored else None

    @property
    def above_zero_interval(self) -> tuple[float, float] | None:
        """Of the share; None if nothing was scored."""
        return jeffreys_interval(self.above_zero, self.scored) if self.scored else None

    @property
    def perfect_interval(self) -> tuple[float, float] | None:
        """Of the share; None if nothing was scored."""
        return jeffreys_interval(self.perfect, self.scored) if self.scored else None

    def cells(self, chosen: bool) -> list[str]:
        """As `HEADINGS` name them; of a sample that was not `chosen`, score > 0 is told of all that could be scored."""
        activated = f"{self.feature_activated:,} of {self.d_sae:,}" if self.d_sae else ""
        scored = f"{self.scored:,} of {self.scoreable:,}"
        return [self.name, activated, scored, self._above_zero(chosen), self._perfect()]

    def _above_zero(self, chosen: bool) -> str:
        if self.share_above_zero is None or self.above_zero_interval is None:
            return ""
        if chosen or self.scored == self.scoreable:
            return f"{self.above_zero:,}"
        low, high = (bound * self.scoreable for bound in self.above_zero_interval)
        return f"about {self.share_above_zero * self.scoreable:,.0f} ({low:,.0f} to {high:,.0f})"

    def _perfect(self) -> str:
        if self.share_perfect is None or self.perfect_interval is None:
            return ""
        low, high = self.perfect_interval
        return f"{self.share_perfect:.3f} ({low:.3f} to {high:.3f})"


@dataclass(frozen=True)
class Table1:
    """The table, and by whom the features were judged."""

    judge: str
    """Its name."""
    judge_passed: bool
    """Whether it passed its self-test."""
    setting: str
    """Of `ComSem`."""
    n_tokens: int
    """Tokens of content of the text."""
    chosen: bool
    """Whether features were named, or sampled at equal firing rates: then shares speak of those that were scored."""
    rows: list[Table1Row]
    """Dictionaries, and random tokens at the end if they were asked about."""

    @property
    def mark(self) -> str:
        """† if the judge failed its self-test."""
        return "" if self.judge_passed else "†"

    def table(self) -> str:
        """In Markdown."""
        return markdown_table(HEADINGS, self.cells())

    def cells(self) -> list[list[str]]:
        """Of each row, with the judge's mark beside the name."""
        cells = [row.cells(self.chosen) for row in self.rows]
        return [[name + self.mark, *rest] for name, *rest in cells]


def table1(report: ComSemReport) -> Table1:
    """From scores; a dictionary of which nothing was scored has what else is known of it."""
    n_random = len(report.random_features)
    random_tokens = DictionaryScores("random tokens", "", "", 0, 0, n_random, report.random_features)
    scores = [*report.dictionaries, random_tokens] if n_random else report.dictionaries
    return Table1(
        judge=report.judge,
        judge_passed=report.self_test.passed,
        setting=report.setting,
        n_tokens=report.n_tokens,
        chosen=bool(report.settings.get("features") or report.settings.get("match_firing_rates")),
        rows=[
            Table1Row(
                name=dictionary.name,
                d_sae=dictionary.d_sae,
                feature_activated=dictionary.feature_activated,
                scoreable=dictionary.scoreable,
                scored=len(dictionary.scores),
                above_zero=dictionary.above_zero,
                perfect=dictionary.perfect,
            )
            for dictionary in scores
        ],
    )
