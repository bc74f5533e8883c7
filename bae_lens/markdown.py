"""Tables in Markdown, which terminals show as they are."""

from collections.abc import Sequence


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]], n_left: int = 1) -> str:
    """Lines of cells below the headings; the first `n_left` columns are aligned to the left, the others to the right.

    >>> print(markdown_table(["dictionary", "L0"], [["BAE", "32.0"]]))
    | dictionary | L0 |
    | --- | ---: |
    | BAE | 32.0 |
    """
    ruler = [*n_left * ["---"], *["---:"] * (len(headings) - n_left)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, ruler, *rows))
