import pytest

from bae_lens.entropy.presets import paper_settings


def test_settings_of_the_paper():
    settings = paper_settings(2048)
    assert (settings.d_sae, settings.dictionaries) == (8192, "per position")
    assert settings.entropy_coefficients == pytest.approx((2.048e-4,))
    fit = settings.fit
    assert (fit.steps, fit.batch_size, fit.lr, fit.lr_decay) == (200 * 512, 512, 5e-4, 0.0)
    assert (fit.entropy_from, fit.encoder_bias, fit.elimination) == (0.25, 0.0, False)
    assert fit.covariance_coefficient == pytest.approx(2.048e-4)


def test_epochs_are_those_of_the_windows():
    assert paper_settings(16, n_windows=1000, batch_size=100).fit.steps == 2000
    assert paper_settings(16, n_windows=50, batch_size=100).fit.steps == 200
