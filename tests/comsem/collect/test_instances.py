import json
from dataclasses import asdict

import pytest

from bae_lens.comsem.collect.instances import Instance
from bae_lens.storage import validated


def test_marks_stand_around_tokens():
    instance = Instance("the cat saw a cat", (4, 7), [(4, 7), (14, 17)])
    assert instance.text == "cat"
    assert instance.marked == "the <<cat>> saw a cat"
    assert instance.highlighted == "the <<cat>> saw a <<cat>>"


def test_an_instance_comes_back_from_json():
    instance = Instance("the cat", (4, 7), [(0, 3), (4, 7)])
    assert validated(Instance, json.loads(json.dumps(asdict(instance))), "it") == instance


@pytest.mark.parametrize("text", ["no token", "<<open", "<<>> empty"])
def test_a_sentence_without_a_token_is_refused(text):
    with pytest.raises(ValueError, match="needs a token between"):
        Instance.from_marked(text)


def test_a_sentence_is_shortened_to_the_words_around_what_is_marked():
    long = Instance.from_marked("One, two three <<four>> five six seven.")
    assert long.shortened(2, [long.token]).marked == "\u2026 two three <<four>> five six \u2026"
    assert long.shortened(4, [long.token]).marked == "One, two three <<four>> five six seven."
    assert long.shortened(0, [long.token]).marked == "\u2026 <<four>> \u2026"
    spread = Instance("a b c d e f g", (4, 5), [(4, 5), (8, 9), (12, 13)], position=3)
    assert spread.shortened(1, [spread.token]) == Instance("\u2026 b c d \u2026", (4, 5), [(4, 5)], 3)
    assert spread.shortened(1, spread.highlights).highlighted == "\u2026 b <<c>> d <<e>> f <<g>>"
