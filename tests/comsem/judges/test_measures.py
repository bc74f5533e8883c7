import pytest
from scipy import stats

from bae_lens.comsem.judges.judge import Verdict
from bae_lens.comsem.judges.measures import (
    auc,
    balanced_accuracy,
    jeffreys_interval,
    share_of_no,
    share_of_yes,
)

YES, NO, UNPARSABLE, FAILED = Verdict(True), Verdict(False), Verdict(None), Verdict(None, failed=True)


def test_an_answer_that_cannot_be_parsed_is_wrong_and_a_failed_one_is_none():
    assert share_of_yes([YES, NO, UNPARSABLE, YES, FAILED]) == 0.5
    assert share_of_no([YES, NO, UNPARSABLE, NO, FAILED]) == 0.5
    assert share_of_yes([FAILED]) is share_of_no([]) is None
    assert balanced_accuracy([YES, YES, NO, YES], [NO, YES]) == (0.75 + 0.5) / 2
    assert balanced_accuracy([YES], []) is None


def test_an_abstention_counts_for_nothing():
    abstention = Verdict(None, abstained=True)
    assert not abstention.is_answer
    assert share_of_yes([YES, NO, abstention]) == share_of_no([YES, NO, abstention]) == 0.5
    assert share_of_yes([abstention]) is None


def test_jeffreys_interval():
    low, high = jeffreys_interval(3, 8)
    assert stats.beta(3.5, 5.5).cdf([low, high]) == pytest.approx([0.025, 0.975])
    assert jeffreys_interval(0, 8)[0] == 0
    assert jeffreys_interval(8, 8)[1] == 1


def test_auc_counts_pairs_and_ties_half():
    def verdicts(*probabilities):
        return [Verdict(None, probability) for probability in probabilities]

    # pairs: .9 > both, .5 > .4 and ties .5
    assert auc(verdicts(0.9, 0.5), verdicts(0.5, 0.4)) == 3.5 / 4
    assert auc(verdicts(0.9), [NO]) is None
