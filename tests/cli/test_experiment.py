from bae_lens.cli.experiment import COLUMNS, aligned, terminal_table
from bae_lens.comparison.results import TABLE


def test_columns_are_aligned_under_headings_of_two_lines():
    assert aligned([("", "dictionary"), ("explained", "variance")], [["BAE", "0.788"], ["Top-k", "0.82"]]) == (
        "            explained\n"
        "dictionary   variance\n"
        "----------  ---------\n"
        "BAE             0.788\n"
        "Top-k            0.82"
    )


def test_table_fits_a_terminal(make_comparison):
    comparison = make_comparison(names=("BAE", "Top-k", "Top-k transcoder"), seeds=(0, 1, 2))
    lines = terminal_table(comparison).splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) == 3 + 3
    for line, dictionary in zip(lines[3:], comparison.dictionaries, strict=True):
        assert line.startswith(dictionary.name)
        assert all(TABLE[column](dictionary) in line for column in COLUMNS)
