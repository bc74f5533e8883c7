from bae_lens.comsem.collect.instances import Instance
from bae_lens.comsem.judges import few_shot

RAIN = Instance("it was raining again", (7, 14), [(7, 14)], position=3)
SNOW = Instance.from_marked("then <<snow>> fell")


def test_tokens_of_worked_examples_stand_where_it_is_said():
    shown = [token for _, tokens in few_shot.EXPLAINED for token in tokens] + [token for token, _, _ in few_shot.JUDGED]
    for token, position, sentence in shown:
        assert len(sentence[: sentence.index(token)].split()) + 1 == position


def test_there_are_as_many_examples_as_the_authors_give():
    assert len(few_shot.EXPLAINED) == 11
    assert [fits for *_, fits in few_shot.JUDGED].count(True) == 12
    assert len(few_shot.JUDGED) == 22


def test_what_is_asked_comes_last_with_its_position():
    text = few_shot.explain_messages([RAIN, SNOW])[1]["content"]
    assert text.endswith(
        'Token: "raining" at position 3 in sentence: "it was raining again"\n'
        'Token: "snow" at position 2 in sentence: "then snow fell"\nWhat they have in common:'
    )
    text = few_shot.single_messages("weather", RAIN)[1]["content"]
    assert text.endswith('at position 3 in sentence: "it was raining again"\nDescription: "weather"\nAnswer:')
    assert text.count("Answer: Yes") == 12


def test_marked_tokens_are_asked_about_after_turns_of_a_chat():
    messages = few_shot.marked_messages("weather", RAIN)
    assert messages[-1]["content"] == "Sentence: it was <<raining>> again\nDescription: weather"
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 16, "user"]
    assert {message["content"] for message in messages if message["role"] == "assistant"} == {"Yes", "No"}
    messages = few_shot.explain_marked_messages([RAIN, SNOW])
    assert messages[-1]["content"] == "it was <<raining>> again\nthen <<snow>> fell"
    assert messages[2]["content"] == "-ing verbs of work in a kitchen"


def test_requests_differ_only_at_their_end():
    for ask in (few_shot.single_messages, few_shot.marked_messages):
        assert ask("weather", RAIN)[:-1] == ask("weather", SNOW)[:-1]
    first, second = (few_shot.single_messages("weather", one)[1]["content"] for one in (RAIN, SNOW))
    start = next(number for number, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    assert start > 0.95 * len(second)
