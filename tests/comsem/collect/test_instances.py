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
