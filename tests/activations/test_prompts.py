import json
import re
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bae_lens.activations.demo_model import load_demo_model
from bae_lens.activations.prompts import Prompt, century_prompts, prompt_windows, read_prompts


@pytest.fixture
def characters() -> PreTrainedTokenizerFast:
    """A tokenizer of single characters, except that "ab" is one token."""
    vocabulary = {token: i for i, token in enumerate(["<bos>", "ab", *"abc \n|"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<bos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern=Regex("ab|.|\n"), behavior="isolated")  # pyright: ignore
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>")


@pytest.fixture
def read(tmp_path):
    def read(*rows, marker=None):
        path = tmp_path / "prompts.jsonl"
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        return read_prompts(path, marker)

    return read


def test_demonstrations_end_where_they_say(read):
    by_marker, by_character, by_token = (
        *read({"text": "a|bb|c"}, marker="|"),
        *read({"text": "a|bb|c", "ends": [2, 5]}, marker="x"),
        *read({"text": "a|bb|c", "positions": [2, 3]}),
    )
    assert by_marker.ends == by_character.ends == (2, 5)
    assert (by_token.ends, by_token.in_tokens, by_marker.in_tokens) == ((2, 3), True, False)


def test_tokens_of_prompts_and_the_columns_in_which_demonstrations_end(characters, read):
    prompts = read({"text": "c|ab|"}, {"text": "abc|ab|c"}, marker="|")
    windows = prompt_windows(characters, prompts)["prompts"]
    assert windows.tokens.tolist() == [[0, 4, 7, 1, 7, 0, 0], [0, 1, 4, 7, 1, 7, 4]]
    assert windows.ends is not None
    assert windows.ends.tolist() == [[2, 4], [3, 5]]
    assert windows.tokens_at(1).tolist() == windows.tokens_at(2).tolist() == [7, 7]
    assert (windows.document.tolist(), windows.starts_with_bos) == ([0, 1], True)
    characters.bos_token = None
    windows = prompt_windows(characters, read({"text": "c|ab|", "positions": [2, 4]}))["prompts"]
    assert windows.ends is not None
    assert (windows.tokens.tolist(), windows.ends.tolist()) == ([[4, 7, 1, 7]], [[1, 3]])


def test_groups_are_kept_apart(characters, read):
    rows = [{"text": "a|", "group": "x"}, {"text": "b|", "group": "y"}, {"text": "c|", "group": "x"}]
    groups = prompt_windows(characters, read(*rows, marker="|"))
    assert {group: windows.tokens[:, 1].tolist() for group, windows in groups.items()} == {"x": [2, 4], "y": [3]}


@pytest.mark.parametrize(
    ("rows", "marker", "message"),
    [
        ([], None, "holds no prompts; write one JSON object a line"),
        (["{"], None, "a JSON object on a line of its own, but line 1 of .* is not JSON"),
        (["[1]"], None, r"object with a text, got \[1\] in line 1"),
        ([{"text": 3}], None, "object with a text"),
        ([{"text": "ab"}], None, "line 1 of .* has neither ends .* nor positions .*; add them, or name the marker"),
        ([{"text": "a|"}, "", {"text": "ab"}], "|", r"the marker '\|' must end each demonstration, but line 3 of"),
        ([{"text": "ab", "ends": [1.5]}], None, r"ends is a list of whole numbers, got \[1.5\] in line 1"),
        ([{"text": "ab", "positions": "1"}], None, "positions is a list of whole numbers, got '1' in line 1"),
        ([{"text": "ab", "ends": [2, 1]}], None, r"must end one after another, but line 1 of .* has ends \[2, 1\]"),
        ([{"text": "ab", "ends": []}], None, r"must end one after another, but line 1 of .* has ends \[\]"),
        ([{"text": "ab", "ends": [0, 1]}], None, "must end one after another"),
        (
            [{"text": "a|", "group": "x"}, {"text": "a|"}],
            "|",
            "either every prompt names its group or none does, but line 2",
        ),
        ([{"text": "a|", "group": "../x"}], "|", "a group is a name of letters, digits, - and _, got '../x'"),
        ([{"text": "a|", "group": 3}], "|", "a group is a name of letters, digits, - and _, got 3"),
    ],
)
def test_impossible_prompts_are_refused(read, rows, marker, message):
    with pytest.raises(ValueError, match=message):
        read(*rows, marker=marker)


def test_unequal_numbers_of_demonstrations_are_refused(characters, read):
    message = "equally many demonstrations, but line 1 of .* holds 2 and line 2 of .* 1; shorten or leave out"
    with pytest.raises(ValueError, match=message):
        prompt_windows(characters, read({"text": "a|b|"}, {"text": "a|b"}, marker="|"))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt("c|", (2, 3)), "must end within the text, but the prompt has 2 characters and an end at 3; correct it"),
        (Prompt("cab", (1, 3), in_tokens=True), "the prompt has 2 tokens and an end at 3"),
        (
            Prompt("cab", (1, 2)),
            "where a token does, but no token of the prompt ends at character 2; end demonstrations",
        ),
    ],
)
def test_ends_that_are_none_are_refused(characters, prompt, message):
    with pytest.raises(ValueError, match=message):
        prompt_windows(characters, [prompt])


def test_tokenizer_that_forgets_characters_takes_positions():
    class Slow:
        bos_token_id = 0

        def __call__(self, text, return_offsets_mapping=False, **_):
            if return_offsets_mapping:
                raise NotImplementedError
            return {"input_ids": [ord(character) for character in text]}

    with pytest.raises(ValueError, match="does not know where its tokens lie; give positions in place of ends"):
        prompt_windows(Slow(), [Prompt("ab", (1,))])
    assert prompt_windows(Slow(), [Prompt("ab", (1,), in_tokens=True)])["prompts"].tokens.tolist() == [[0, 97, 98]]


def test_sentences_and_their_centuries():
    rows = century_prompts(6, 4, seed=3)
    assert [row["group"] for row in rows] == ["correct"] * 6 + ["shuffled"] * 6
    label = re.compile(r"Sentence: (.+)\nCentury: (nineteenth|twentieth)\n")
    correct, shuffled = ([label.findall(row["text"]) for row in half] for half in (rows[:6], rows[6:]))
    assert [[text for text, _ in prompt] for prompt in correct] == [[text for text, _ in prompt] for prompt in shuffled]
    assert [sorted(name for _, name in prompt) for prompt in correct] == [
        sorted(name for _, name in prompt) for prompt in shuffled
    ]
    assert correct != shuffled
    true = {sentence: name for prompt in correct for sentence, name in prompt}
    assert len(true) == 24
    assert sorted(true.values()) == ["nineteenth"] * 12 + ["twentieth"] * 12
    for row in rows:
        assert [row["text"][:end].count("\n") for end in row["ends"]] == [2, 4, 6, 8]
        assert all(row["text"][end - 1] == "\n" for end in row["ends"])
    assert century_prompts(6, 4, seed=3) == rows != century_prompts(6, 4, seed=4)


def test_more_sentences_than_there_are_are_refused():
    with pytest.raises(ValueError, match=r"need as many sentences of each century, and there are \d+ and \d+"):
        century_prompts(10_000, 100)
    with pytest.raises(ValueError, match="ask for at least 1"):
        century_prompts(0)


def test_written_rows_are_read_as_they_were_made(characters, read):
    prompts = read(*century_prompts(2, 3))
    assert {prompt.group for prompt in prompts} == {"correct", "shuffled"}
    windows = prompt_windows(characters, prompts)["correct"]
    assert windows.ends is not None
    assert torch.equal(windows.tokens_at(3), torch.full((2,), 6))


@pytest.mark.slow
def test_demonstrations_end_with_a_token_of_the_embedded_model(read):
    tokenizer: Any = load_demo_model().tokenizer
    for windows in prompt_windows(tokenizer, read(*century_prompts(64, 8))).values():
        assert windows.ends is not None
        last, before = (windows.tokens.gather(1, windows.ends - back).flatten() for back in (0, 1))
        assert {tokenizer.decode(token) for token in last} == {"\n"}
        assert all(tokenizer.decode(token).strip() in "nineteenth twentieth" for token in before)
