import pytest

from bae_lens.comsem.collect.sentences import sentence_spans


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two.", ["One.", "Two."]),
        ('He said "Go!" Then he left.', ['He said "Go!"', "Then he left."]),
        ("Mr. Smith of the U.S. Senate spoke.", ["Mr. Smith of the U.S. Senate spoke."]),
        ("It cost 3.50 in all. Fine.", ["It cost 3.50 in all.", "Fine."]),
        ("J. Q. Adams came (late).  He sat…\nWe rose.", ["J. Q. Adams came (late).", "He sat…", "We rose."]),
        ("a heading\n\nA sentence without an end", ["a heading", "A sentence without an end"]),
        ("It ended at no. five. yes", ["It ended at no. five. yes"]),
        ("これは本。はい！", ["これは本。", "はい！"]),  # noqa: RUF001
        ("  \n ", []),
        ("", []),
    ],
)
def test_sentences_and_their_places(text, sentences):
    assert [text[start:end] for start, end in sentence_spans(text)] == sentences
