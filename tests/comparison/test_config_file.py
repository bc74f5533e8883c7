import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bae_lens.activations.forward import hook_widths
from bae_lens.comparison.config_file import read_specs
from bae_lens.comparison.dictionaries import DictionarySpec

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes a config file."""

    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


def test_file_is_read(write):
    path = write("""
hook_name: blocks.3.hook_resid_post
training: {batch_size: 64}
dictionaries:
  ours:
    architecture: bae
    config: {target_l0: 16.0}
    trials: [{lr: 0.001}, {lr: 0.002, entropy_coefficient: 0.1}]
  theirs: {architecture: transcoder, hook_name: a, hook_name_out: b, lr: 0.01}
""")
    content, dictionaries = read_specs(path)
    assert content == {"hook_name": "blocks.3.hook_resid_post", "training": {"batch_size": 64}}
    trials = ({"lr": 0.001}, {"lr": 0.002, "entropy_coefficient": 0.1})
    assert dictionaries == {
        "ours": DictionarySpec("bae", {"target_l0": 16.0}, trials=trials),
        "theirs": DictionarySpec("transcoder", lr=0.01, hook_name="a", hook_name_out="b"),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "dictionaries: {a: {architecture: bae}, a: {architecture: topk}}",
            "is not YAML that can be read: 'a' comes",
        ),
        ("seed: 1\nseed: 2", "'seed' comes twice"),
        ("- 1", "must hold a mapping of settings, got list"),
        ("", "must hold a mapping of settings, got NoneType"),
        ("a: [", "is not YAML that can be read"),
        ("dictionaries: {a: {lr: 3}}", "dictionary 'a' takes architecture, config, hook_name, .* got {'lr': 3}"),
        ("dictionaries: {a: {architecture: bae, rate: 3}}", "dictionary 'a' takes architecture, config"),
        ("dictionaries: {a: bae}", "dictionary 'a' takes architecture, config, .* got 'bae'"),
        ("dictionaries: {a: {architecture: bea}}", "architecture must be one of"),
        ("a: &a [1]\nb: *a", "aliases are not read; write the value out"),
        ("a: &a [*a]", "aliases are not read; write the value out"),
        ("seeds: &a [1, 2]\ndictionaries: {a: {architecture: bae, config: *a}}", "aliases are not read"),
        ("a: " + "[" * 2000 + "]" * 2000, "is not YAML that can be read: maximum recursion"),
        ("{[a, b]: 1}", "unhashable key"),
        ("when: 2001-99-99", "is not YAML that can be read: month"),
        ("# " + "x" * 2**18, "has more than 262144 bytes"),
        ("dictionaries: {1: {architecture: bae}}", "the name of a dictionary must be text, got 1; put it in quotes"),
        ("dictionaries: {no: {architecture: bae}}", "the name of a dictionary must be text, got False; put it in"),
        ("dictionaries: {a: {architecture: bae, config: {2001-01-01: 1}}}", "names must be text"),
    ],
)
def test_file_that_cannot_be_is_refused(write, text, message):
    with pytest.raises(ValueError, match=message):
        read_specs(write(text))


def test_what_is_shown_of_a_wrong_value_is_short(write):
    for text in (f"dictionaries: {{a: {{x: {list(range(9999))}}}}}", f"dictionaries: {list(range(9999))}"):
        with pytest.raises(ValueError, match=r"config\.yaml: dictionar") as refused:
            read_specs(write(text))
        assert len(str(refused.value)) < 400


def test_many_keys_are_read_in_time_that_grows_with_them(write):
    content, _ = read_specs(write("".join(f"a{i}: 1\n" for i in range(20_000))))
    assert len(content) == 20_000


WRONG_TYPES = {
    "dictionaries: [bae]": "a list instead of a mapping",
    "dictionaries: {a: {architecture: bae, trials: 3}}": "a number instead of a list",
    "dictionaries: {a: {architecture: bae, trials: [3]}}": "a trial that is no mapping",
    "dictionaries: {a: {architecture: bae, config: 3}}": "a config that is no mapping",
    "dictionaries: {a: {architecture: bae, preset: best}}": "a preset that is none",
}


@pytest.mark.parametrize("text", WRONG_TYPES, ids=[re.sub(" ", "_", reason) for reason in WRONG_TYPES.values()])
def test_wrong_types_in_a_description_are_refused(write, tiny_model, text):
    with pytest.raises(ValueError):  # noqa: PT011
        read_specs(write(text))[1]["a"].contender_by_width(partial(hook_widths, tiny_model), HOOK, 4, 100)
