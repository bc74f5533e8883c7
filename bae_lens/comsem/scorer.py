"""What is asked of one feature after another, many at a time, and what becomes of the answers."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tqdm.auto import tqdm

from bae_lens.comsem.collect.instances import FeatureInstances, Instance
from bae_lens.comsem.judges.judge import Judge, Question, Verdict
from bae_lens.comsem.judges.measures import auc, balanced_accuracy, jeffreys_interval, mean, share_of_no, share_of_yes
from bae_lens.comsem.judges.mixed import ask_mixed
from bae_lens.comsem.judges.self_test import Calibration
from bae_lens.comsem.judges.spending import BudgetSpentError
from bae_lens.comsem.judges.together import together
from bae_lens.comsem.results import FeatureScore, Judged
from bae_lens.comsem.scores.catalog import SCORES, ScoreName
from bae_lens.comsem.scores.outcome import Outcome

VAGUE = "a word"  # what says nothing of a token
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
    scores: tuple[ScoreName, ...]
    """Ask for these scores too."""
    explanation_controls: bool
    """Ask for every score with another feature's explanation and with one that says nothing."""
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
        asked: list[Any] = [
            self._ask(explanation, instances, with_controls=self.controls),
            self._outcomes(explanation, instances, self.scores),
        ]
        (held_out, control), outcomes = await together(asked)
        counted = [Outcome.of_verdicts(None, [*held_out, *control]), *outcomes.values()]
        values = {name: outcome.value for name, outcome in outcomes.items()}
        answered = [verdict for verdict in held_out if verdict.is_answer]
        probabilities = [verdict.probability for verdict in held_out if verdict.probability is not None]
        return FeatureScore(
            feature=instances.feature,
            firing_rate=instances.firing_rate,
            n_instances=instances.n_instances,
            explanation=explanation,
            examples=instances.explain,
            held_out=_judged(instances.held_out, held_out),
            controls=_judged(instances.controls, control) if self.controls else [],
            score=share_of_yes(held_out),
            interval=jeffreys_interval(sum(verdict.yes is True for verdict in answered), len(answered))
            if answered
            else None,
            specificity=share_of_no(control),
            balanced_accuracy=balanced_accuracy(held_out, control),
            auc=auc(held_out, control),
            probability=mean([self.calibration(value) for value in probabilities]) if self.calibration else None,
            detection=values.get("detection"),
            fuzzing=values.get("fuzzing"),
            unparsable=sum(outcome.unparsable for outcome in counted),
            failed=sum(outcome.failed for outcome in counted),
            abstained=sum(outcome.abstained for outcome in counted),
            intruder=values.get("intruder"),
            intruder_interval=outcomes["intruder"].interval if "intruder" in outcomes else None,
            simulation=values.get("simulation"),
        )

    async def _ask(
        self, explanation: str, instances: FeatureInstances, with_controls: bool
    ) -> tuple[list[Verdict], list[Verdict]]:
        controls, order = instances.controls if with_controls else [], self._order(instances)
        return await ask_mixed(self.judge, explanation, instances.held_out, controls, self.question, order)

    async def _outcomes(
        self, explanation: str, instances: FeatureInstances, names: Sequence[ScoreName]
    ) -> dict[ScoreName, Outcome]:
        order = self._order(instances)
        asked = [SCORES[name].ask(self.judge, explanation, instances, order) for name in names]
        return dict(zip(names, await together(asked), strict=True))

    def _order(self, instances: FeatureInstances) -> str:
        """Seed of the order of what is shown of a feature."""
        return f"{self.seed} {instances.feature}"

    async def ask_explanation_controls(
        self, features: list[FeatureScore], instances: list[FeatureInstances], n: int
    ) -> tuple[list[FeatureScore], str | None]:
        """Adds what n of the features get with explanations that are not theirs, or why it stopped.

        The tokens, controls among them, are those that were asked about with the right explanation, in the same order.
        """
        explained = [number for number, feature in enumerate(features) if feature.explanation is not None]
        chosen = random.Random(self.seed).sample(explained, min(n, len(explained)))
        others = [*chosen[1:], *chosen[:1]] if len(chosen) > 1 else []
        try:
            of_other = await together(
                [
                    self._measures(str(features[other].explanation), instances[number])
                    for number, other in zip(chosen, others, strict=False)
                ]
            )
            of_vague = await together(
                [self._measures(VAGUE, instances[number]) for number in chosen if self.explanation_controls]
            )
        except BudgetSpentError as error:
            return features, f"{error}: the baselines are incomplete; answers so far are kept"
        scored = list(features)
        for number, measures in zip(chosen, of_other, strict=False):
            scored[number] = replace(scored[number], shuffled=measures["score"], with_other=measures)
        for number, measures in zip(chosen, of_vague, strict=False):
            scored[number] = replace(scored[number], with_vague=measures)
        return scored, None

    async def _measures(self, explanation: str, instances: FeatureInstances) -> dict[str, float | None]:
        """What an explanation gets of a feature, by name of the field of `FeatureScore`."""
        with_controls = self.controls and (self.question != "token" or self.explanation_controls)
        chosen = self.scores if self.explanation_controls else ()
        names: list[ScoreName] = [name for name in chosen if SCORES[name].of_explanation]
        asked: list[Any] = [
            self._ask(explanation, instances, with_controls),
            self._outcomes(explanation, instances, names),
        ]
        (held_out, control), outcomes = await together(asked)
        return {
            "score": share_of_yes(held_out),
            "balanced_accuracy": balanced_accuracy(held_out, control),
            **{name: outcome.value for name, outcome in outcomes.items()},
        }


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
