from dataclasses import replace

import pytest
from matplotlib import pyplot
from matplotlib.image import imread

from bae_lens.report.png import write_pictures
from bae_lens.report.series import colors

NAMES = [
    "explained_variance_by_bits.png",
    "explained_variance_by_l0.png",
    "explained_variance_with_every_help.png",
    "firing_frequencies.png",
]


def test_pictures_are_written_and_leave_nothing_open(comparison, tmp_path):
    paths = write_pictures(comparison, tmp_path)
    assert [path.name for path in paths] == NAMES
    assert sorted((tmp_path / "pictures").iterdir()) == sorted(paths)
    assert pyplot.get_fignums() == []


def test_help_that_was_not_measured_is_in_no_picture(comparison, tmp_path):
    without = replace(comparison, experiment=replace(comparison.experiment, every_help=False))
    assert [path.name for path in write_pictures(without, tmp_path)] == [NAMES[0], NAMES[1], NAMES[3]]


def test_a_panel_for_each_hook(comparison, tmp_path):
    wide, *_, narrow = (imread(path) for path in write_pictures(comparison, tmp_path))
    assert wide.shape[1] == 2 * narrow.shape[1] == 1800


@pytest.mark.slow
def test_pictures_show_the_colors_of_the_page(make_comparison, tmp_path):
    comparison = make_comparison(("Top-k", "BAE"))
    for path in write_pictures(comparison, tmp_path):
        shown = {tuple(pixel) for pixel in (imread(path)[..., :3] * 255).round().astype(int).reshape(-1, 3).tolist()}
        for color in colors(comparison).values():
            assert tuple(bytes.fromhex(color[1:])) in shown


@pytest.mark.parametrize(("name", "other"), [(r"$\unknown", r"$\unknowm"), (r"$\frac$", r"$\frbc$"), ("_a", "_b")])
def test_names_are_no_markup(make_comparison, tmp_path, name, other):
    """Neither mathematics nor, with an underscore, a request to be left out of the legend."""
    pictures = [write_pictures(make_comparison((n,), n_trials=0), tmp_path / n[-3:].strip("$")) for n in (name, other)]
    for first, second in zip(*pictures, strict=True):
        assert first.read_bytes() != second.read_bytes()


def test_nothing_asked_and_nothing_tried(make_comparison, tmp_path):
    comparison = make_comparison(n_trials=0)
    comparison = replace(comparison, experiment=replace(comparison.experiment, l0=None))
    assert len(write_pictures(comparison, tmp_path)) == 4
