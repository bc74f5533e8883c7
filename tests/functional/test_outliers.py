import pytest
import torch

from bae_lens.functional.outliers import OUTLIER_NORM, SINK_NORM, is_outlier


@pytest.mark.parametrize("median", [2.0, torch.tensor(2.0)])
def test_only_norms_over_five_times_the_median_are(median):
    norms = torch.tensor([[0.0, 9.9], [10.0, 10.1]])

    assert OUTLIER_NORM == 5
    assert is_outlier(norms, median).tolist() == [[False, False], [False, True]]


def test_sinks_are_further_out_than_content_whose_norm_differs_by_token():
    assert is_outlier(torch.tensor([99.0, 101.0]), 10.0, SINK_NORM).tolist() == [False, True]


def test_unknown_norms_are_not():
    assert not is_outlier(torch.tensor(torch.nan), 1.0)
