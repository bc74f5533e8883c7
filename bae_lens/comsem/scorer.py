"""What is asked of one feature after another, many at a time, and what becomes of the answers."""

import random
from dataclasses import dataclass, replace
from typing import Literal

from tqdm.auto import tqdm

from bae_lens.comsem.collect.instances import FeatureInstances, Instance
from bae_lens.comsem.judges.judge import Judge, Question, Verdict
from bae_lens.comsem.judges.measures import auc, balanced_accuracy, jeffreys_interval, mean, share_of_no, share_of_yes
from bae_lens.comsem.judges.mixed import ask_mixed
from bae_lens.comsem.judges.self_test import Calibration
from bae_lens.comsem.judges.spending import BudgetSpentError
from bae_lens.comsem.judges.together import together
from bae_lens.comsem.results import FeatureScore, Judged

FEATURES_AT_ONCE = 64  # whose questions are on their way; how many calls there are at once is the judge's to limit


@dataclass(frozen=True)
class FeatureScorer:
    """How features are asked about; the fields are those of `ComSem`."""

    judge: Judge
    """Says whether an explanation fits."""
    explainer: Judge
    """Writes the explanations."""
    question: Question
    """About a token: "token" or "marked token"."""
    calibration: Calibration | None
    """Of the judge's yes-probabilities."""
    controls: bool
    """Ask about tokens that do not activate the feature."""
    passage_scores: bool
    """Ask for the detection and fuzzing scores."""
    seed: int
    """Of the order of what is asked, and of which features are judged by another's explanation."""
    purpose: Literal["scoring", "estimating"] = "scoring"
    """For the progress bar."""

    async def score_features(
        self, features: list[FeatureInstances], name: str
    ) -> tuple[list[FeatureScore], str | None]:
        """Scores in the order of `features`, of as many as the budget allows, and why it stopped if it did."""
        scores: dict[int, FeatureScore] = {}
        waiting = iter(enumerate(features))
        stopped: list[str] = []
        with tqdm(total=len(features), desc=f"{self.purpose} {name}", unit="feature") as progress:

            async def work() -> None:
                for number, feature in waiting:
                    if stopped:
                        return
                    try:
                        scores[number] = await self._score_feature(feature)
                    except BudgetSpentError as error:
                        stopped.append(f"{error}: {name} and what follows is incomplete; answers so far are kept")
                        return
                    except Exception as error:
                        stopped.append(str(error))
                        raise
                    progress.update()

            await together([work() for _ in range(min(FEATURES_AT_ONCE, len(features)))])
        return [scores[number] for number in sorted(scores)], stopped[0] if stopped else None

    async def _score_feature(self, instances: FeatureInstances) -> FeatureScore:
        explanation = await self.explainer.explain(instances.explain, marked=self.question == "marked token")
        if not explanation:
            return _unexplained(instances, failed=explanation is None)
        controls = instances.controls if self.controls else []
        passages = (instances.held_out, instances.controls) if self.passage_scores and instances.controls else ([], [])
        new_held_out, new_controls = (
            [instance for instance in kind if not self._asked_already(instance)] for kind in passages
        )
        answers = await together(
            [
                self._ask(explanation, instances.feature, instances.held_out, controls, self.question),
                self._ask(explanation, instances.feature, *passages, "passage"),
                self._ask(explanation, instances.feature, new_held_out, new_controls, "highlights"),
            ]
        )
        marked, passage, highlights = answers
        held_out, control = marked
        fuzzing = [self._fuzzing(*kind) for kind in zip(passages, marked, highlights, strict=True)]
        verdicts = [verdict for answer in answers for kind in answer for verdict in kind]
        answered = [verdict for verdict in held_out if verdict.is_answer]
        probabilities = [verdict.probability for verdict in held_out if verdict.probability is not None]
        return FeatureScore(
            feature=instances.feature,
            firing_rate=instances.firing_rate,
            n_instances=instances.n_instances,
            explanation=explanation,
            examples=instances.explain,
            held_out=_judged(instances.held_out, held_out),
            controls=_judged(controls, control),
            score=share_of_yes(held_out),
            interval=jeffreys_interval(sum(verdict.yes is True for verdict in answered), len(answered))
            if answered
            else None,
            specificity=share_of_no(control),
            balanced_accuracy=balanced_accuracy(held_out, control),
            auc=auc(held_out, control),
            probability=mean([self.calibration(value) for value in probabilities]) if self.calibration else None,
            detection=balanced_accuracy(*passage),
            fuzzing=balanced_accuracy(*fuzzing),
            unparsable=sum(verdict.yes is None and verdict.is_answer for verdict in verdicts),
            failed=sum(verdict.failed for verdict in verdicts),
            abstained=sum(verdict.abstained for verdict in verdicts),
        )

    def _asked_already(self, instance: Instance) -> bool:
        """Whether the two questions about marks are one: only the token is highlighted, and is asked about as such."""
        return self.question == "marked token" and self.controls and instance.highlights == [instance.token]

    def _fuzzing(self, instances: list[Instance], marked: list[Verdict], highlights: list[Verdict]) -> list[Verdict]:
        """Verdicts on the highlights: those on the marked token, and on several in the order of their instances."""
        rest = iter(highlights)
        return [
            marked[number] if self._asked_already(instance) else next(rest) for number, instance in enumerate(instances)
        ]

    async def _ask(
        self, explanation: str, feature: int, held_out: list[Instance], controls: list[Instance], question: Question
    ) -> tuple[list[Verdict], list[Verdict]]:
        return await ask_mixed(self.judge, explanation, held_out, controls, question, f"{self.seed} {feature}")

    async def shuffle(self, features: list[FeatureScore], n: int) -> tuple[list[FeatureScore], str | None]:
        """Adds the share of yes with another feature's explanation for n of the features, or why it stopped.

        The tokens, controls among them, are those that were asked about with the right explanation, in the same order.
        """
        explained = [number for number, feature in enumerate(features) if feature.explanation is not None]
        chosen = random.Random(self.seed).sample(explained, min(n, len(explained)))
        others = [*chosen[1:], *chosen[:1]] if len(chosen) > 1 else []
        try:
            answers = await together(
                [
                    self._ask_again(str(features[other].explanation), features[number])
                    for number, other in zip(chosen, others, strict=False)
                ]
            )
        except BudgetSpentError as error:
            return features, f"{error}: the baselines are incomplete; answers so far are kept"
        shares = dict(zip(chosen, map(share_of_yes, answers), strict=False))
        return [replace(feature, shuffled=shares.get(number)) for number, feature in enumerate(features)], None

    async def _ask_again(self, explanation: str, feature: FeatureScore) -> list[Verdict]:
        controls = [] if self.question == "token" else [judged.instance for judged in feature.controls]
        held_out = [judged.instance for judged in feature.held_out]
        return (await self._ask(explanation, feature.feature, held_out, controls, self.question))[0]


def _unexplained(instances: FeatureInstances, failed: bool) -> FeatureScore:
    return FeatureScore(
        feature=instances.feature,
        firing_rate=instances.firing_rate,
        n_instances=instances.n_instances,
        explanation=None,
        examples=instances.explain,
        held_out=[],
        controls=[],
        score=None,
        interval=None,
        specificity=None,
        balanced_accuracy=None,
        auc=None,
        probability=None,
        detection=None,
        fuzzing=None,
        unparsable=int(not failed),
        failed=int(failed),
    )


def _judged(instances: list[Instance], verdicts: list[Verdict]) -> list[Judged]:
    return [Judged(instance, verdict) for instance, verdict in zip(instances, verdicts, strict=True)]
