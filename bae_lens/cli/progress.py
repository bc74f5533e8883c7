"""What a long command says while it works: its stages, how long the rest will take, and results as they come."""

from collections.abc import Mapping

from bae_lens.evaluation.metrics import DictionaryMetrics

ROW = "    {:<20} {:>18} {:>6} {:>12} {:>10}"


class Progress:
    """Prints a line for everything that begins or ends, on a terminal as in a file.

    What is left is estimated from what each stage took elsewhere and from how long those so far took here.
    """

    def __init__(self, expected: Mapping[str, float]) -> None:
        """`expected` are the stages in their order with their seconds on another machine; it prints the list."""
        self.expected, self.order = expected, list(expected)
        self.taken: dict[str, float] = {}
        self.measured = 0
        _say(f"{len(expected)} stages, about {duration(sum(expected.values()))} on two idle cores:")
        _say(f"  {', '.join(self.order)}")

    def on_stage(self, name: str, seconds: float | None) -> None:
        """A stage begins, or has ended after so many seconds."""
        place = f"[{self.order.index(name) + 1}/{len(self.order)}] {name}"
        if seconds is None:
            _say(f"{place}: {duration(self.expected[name] * self.pace)}, all that is left {duration(self.left(name))}")
        else:
            self.taken[name] = seconds
            _say(f"{place}: done in {duration(seconds)}")

    def on_measured(self, name: str, metrics: DictionaryMetrics) -> None:
        """A dictionary was measured."""
        if not self.measured:
            _say(ROW.format("dictionary", "explained variance", "L0", "support bits", "value bits"))
        self.measured += 1
        code = metrics.code
        cells = (f"{metrics.explained_variance:.3f}", f"{code.l0:.1f}", f"{code.support_bits:.0f}")
        _say(ROW.format(name, *cells, f"{metrics.value_bits:.0f}"))

    @property
    def pace(self) -> float:
        """How many times as long as expected the stages so far took."""
        expected = sum(self.expected[name] for name in self.taken)
        return sum(self.taken.values()) / expected if expected else 1.0

    def left(self, name: str) -> float:
        """Seconds from the beginning of a stage to the end of the last."""
        return self.pace * sum(self.expected[later] for later in self.order[self.order.index(name) :])


def duration(seconds: float) -> str:
    """As a person says it: seconds, or minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _say(line: str) -> None:
    print(line, flush=True)
