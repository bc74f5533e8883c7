"""Sentences of a text, by a simple rule, with their places in it."""

import re

CLOSING = r"""["'\u201d\u2019)\]]*"""
FULL_WIDTH = r"[\u3002\uff01\uff1f]+[\u300d\u300f\u201d\u2019\uff09]*"
END = re.compile(rf"[.!?\u2026]+{CLOSING}(?=\s)|{FULL_WIDTH}|\n\s*\n")
ABBREVIATION = re.compile(
    r"\b(?:[^\W\d_]|mrs?|ms|dr|prof|sr|jr|st|messrs|hon|gen|col|capt|lt|sgt|rev|gov|sen|rep|pres|fig|vol|art|sec|dept|inc|co|"
    r"corp|ltd|vs|etc|al|cf|e\.g|i\.e|u\.s|u\.k|u\.n|a\.m|p\.m|jan|feb|mar|apr|jun|jul|aug|sept|oct|nov|dec)\.$",
    re.IGNORECASE,
)
LONGEST_ABBREVIATION = 8  # characters, with what stands before it


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Start and end of each sentence in `text`, without the white space between them.

    A sentence ends after `.`, `!`, `?` or an ellipsis and the quotes and brackets that close with it, before white
    space; after their full-width forms; and at an empty line. A period after an abbreviation or a single letter, or
    before a small letter, does not end one.

    >>> [text[start:end] for text in ["Dr. No won. Why? (He ran.)"] for start, end in sentence_spans(text)]
    ['Dr. No won.', 'Why?', '(He ran.)']
    """
    ends = [match.end() for match in END.finditer(text) if _ends_sentence(text, match)]
    spans, start = [], 0
    for end in [*ends, len(text)]:
        sentence = text[start:end]
        if sentence.strip():
            spans.append((start + len(sentence) - len(sentence.lstrip()), start + len(sentence.rstrip())))
        start = end
    return spans


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    if match.group() != ".":
        return True
    abbreviated = ABBREVIATION.search(text[max(0, match.end() - LONGEST_ABBREVIATION) : match.end()])
    return not (abbreviated or text[match.end() :][:8].lstrip()[:1].islower())
