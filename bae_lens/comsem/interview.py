"""What is asked of one feature after another, many at a time, and what becomes of the answers."""

import random
from dataclasses import dataclass, replace

from tqdm.auto import tqdm

from bae_lens.comsem.instances import FeatureInstances, Instance, Judge, Question, Verdict
from bae_lens.comsem.measures import auc, balanced_accuracy, jeffreys_interval, mean, share_of_no, share_of_yes
from bae_lens.comsem.results import FeatureScore, Judged
from bae_lens.comsem.self_test import Calibration
from bae_lens.comsem.spending import BudgetSpentError
from bae_lens.comsem.together import together

FEATURES_AT_ONCE = 64  # whose questions are on their way; how many calls there are at once is the judge's to limit


@dataclass(frozen=True)
class Interview:
    """How features are asked about; the fields are those of `ComSem`."""

    judge: Judge
    describer: Judge
    question: Question
    """About a token: "token" or "marked token"."""
    calibration: Calibration | None
    """Of the judge's yes-probabilities."""
    controls: bool
    passage_scores: bool
    seed: int

    async def score_features(
        self, features: list[FeatureInstances], name: str
    ) -> tuple[list[FeatureScore], str | None]:
        """Scores in the order of `features`, of as many as the budget allows, and why it stopped if it did."""
        scores: dict[int, FeatureScore] = {}
        waiting = iter(enumerate(features))
        stopped: list[str] = []
        with tqdm(total=len(features), desc=f"scoring {name}", unit="feature") as progress:

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
        description = await self.describer.describe(instances.describe, marked=self.question == "marked token")
        if not description:
            return _undescribed(instances, failed=description is None)
        controls = instances.controls if self.controls else []
        passages = [*instances.held_out, *instances.controls] if self.passage_scores and instances.controls else []
        order = random.Random(f"{self.seed} {instances.feature}").sample(range(len(passages)), len(passages))
        shuffled = [passages[number] for number in order]
        answers = await together(
            [
                self._ask(description, instances.held_out, self.question),
                self._ask(description, controls, self.question),
                self._ask(description, shuffled, "passage"),
                self._ask(description, shuffled, "highlights"),
            ]
        )
        back = [order.index(number) for number in range(len(order))]
        passage, highlights = ([verdicts[number] for number in back] for verdicts in answers[2:])
        n = len(instances.held_out)
        held_out, control = answers[:2]
        verdicts = [verdict for answer in answers for verdict in answer]
        answered = [verdict for verdict in held_out if not verdict.failed]
        probabilities = [verdict.probability for verdict in held_out if verdict.probability is not None]
        return FeatureScore(
            feature=instances.feature,
            firing_rate=instances.firing_rate,
            n_instances=instances.n_instances,
            description=description,
            examples=instances.describe,
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
            detection=balanced_accuracy(passage[:n], passage[n:]),
            fuzzing=balanced_accuracy(highlights[:n], highlights[n:]),
            unparsable=sum(verdict.yes is None and not verdict.failed for verdict in verdicts),
            failed=sum(verdict.failed for verdict in verdicts),
        )

    async def _ask(self, description: str, instances: list[Instance], question: Question) -> list[Verdict]:
        return await self.judge.judge(description, instances, question) if instances else []

    async def shuffle(self, features: list[FeatureScore], n: int) -> tuple[list[FeatureScore], str | None]:
        """Adds the share of yes with another feature's description for n of the features, or why it stopped."""
        described = [number for number, feature in enumerate(features) if feature.description is not None]
        chosen = random.Random(self.seed).sample(described, min(n, len(described)))
        pairs = list(zip(chosen, [*chosen[1:], *chosen[:1]], strict=True)) if len(chosen) > 1 else []
        held_out = [[judged.instance for judged in features[number].held_out] for number in chosen]
        descriptions = [str(features[other].description) for _, other in pairs]
        try:
            answers = await together(
                [
                    self._ask(description, instances, self.question)
                    for description, instances in zip(descriptions, held_out, strict=False)
                ]
            )
        except BudgetSpentError as error:
            return features, f"{error}: the baselines are incomplete; answers so far are kept"
        shares = {number: share_of_yes(answer) for (number, _), answer in zip(pairs, answers, strict=True)}
        return [replace(feature, shuffled=shares.get(number)) for number, feature in enumerate(features)], None


def _undescribed(instances: FeatureInstances, failed: bool) -> FeatureScore:
    return FeatureScore(
        feature=instances.feature,
        firing_rate=instances.firing_rate,
        n_instances=instances.n_instances,
        description=None,
        examples=instances.describe,
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
