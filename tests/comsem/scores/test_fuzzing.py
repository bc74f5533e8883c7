import asyncio

from bae_lens.comsem.collect.instances import FeatureInstances, Instance
from bae_lens.comsem.judges.judge import Verdict
from bae_lens.comsem.scores.fuzzing import fuzzing

ONE, TWO = Instance("cat", (0, 3), [(0, 3)]), Instance("a cat a cat", (2, 5), [(2, 5), (8, 11)])
OTHER, OTHERS = Instance("dog", (0, 3), [(0, 3)]), Instance("a dog a dog", (2, 5), [(2, 5), (8, 11)])


class Recorder:
    """Finds cats, and what it is asked to compare."""

    def __init__(self, wrong=None):
        self.asked, self.wrong = {}, wrong

    async def judge(self, _, instances, question):
        self.asked[question] = set(map(str, instances))
        return [Verdict(("cat" in instance.text) is (instance is not self.wrong)) for instance in instances]


def score(judge, held_out, controls):
    instances = FeatureInstances(0, 0.1, 20, [], held_out, controls)
    return asyncio.run(fuzzing(judge, "cats", instances, "0 0"))  # pyright: ignore[reportArgumentType]


def test_where_only_the_token_is_highlighted_the_question_is_that_about_marked_tokens():
    judge = Recorder()
    assert score(judge, [ONE, TWO], [OTHERS, OTHER]).value == 1
    assert judge.asked["marked token"] == set(map(str, [ONE, TWO, OTHER, OTHERS])), "as the feature's own question"
    assert judge.asked["highlights"] == {str(TWO), str(OTHERS)}


def test_each_verdict_goes_to_its_instance():
    for wrong in (ONE, TWO, OTHER, OTHERS):
        assert score(Recorder(wrong), [ONE, TWO], [OTHERS, OTHER]).value == 0.75


def test_answers_of_no_use_are_counted_whichever_question_they_are_to():
    class Judge:
        async def judge(self, _, instances, question):
            lost = Verdict(None, failed=True) if question == "marked token" else Verdict(None)
            return [lost if instance in (ONE, TWO) else Verdict("cat" in instance.text) for instance in instances]

    outcome = score(Judge(), [ONE, TWO, ONE], [OTHERS, OTHER])
    assert (outcome.failed, outcome.unparsable) == (2, 1)


def test_without_single_highlights_nothing_else_is_asked():
    judge = Recorder()
    score(judge, [TWO], [OTHERS])
    assert set(judge.asked) == {"highlights"}
    judge = Recorder()
    score(judge, [ONE], [OTHER])
    assert set(judge.asked) == {"marked token"}
    assert score(judge, [ONE], []).value is None
