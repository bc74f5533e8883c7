import pytest

from bae_lens.activations.hook_names import expand_hooks, layer_hook


def test_patterns_and_names_keep_their_order():
    assert expand_hooks(["blocks.{4..0..2}.{hook_resid_post,hook_mlp_out}", "hook_embed"]) == [
        *("blocks.4.hook_resid_post", "blocks.4.hook_mlp_out", "blocks.2.hook_resid_post", "blocks.2.hook_mlp_out"),
        *("blocks.0.hook_resid_post", "blocks.0.hook_mlp_out", "hook_embed"),
    ]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ([], "hook_name needs at least one hook, got none; name one, such as"),
        ("", "or a pattern such as .*, got ''; close its braces"),
        ("blocks.{0,5.hook_resid_post", "got 'blocks.{0,5.hook_resid_post'; close its braces, and put no space in it"),
        ("blocks.{0, 5}.hook_resid_post", "got 'blocks.{0, 5}.hook_resid_post'; close its braces"),
        ("blocks.{3}.hook_resid_post", "got 'blocks.{3}.hook_resid_post'; close"),
        (
            "blocks.{0..999999999}.x",
            "a run takes 512 hooks at most, got more from blocks.{0..999999999}.x; name",
        ),
        (["blocks.{1..300}.x", "blocks.{1..300}.y"], "512 hooks at most, got more from blocks.{1..300}.x, blocks.{1"),
        (["blocks.{0,1}.x", "blocks.1.x"], "hooks must be different, got blocks.1.x twice; leave one out"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(patterns, message):
    with pytest.raises(ValueError, match=message.replace("{", r"\{")):
        expand_hooks(patterns)


def test_layer_of_a_hook():
    assert layer_hook("blocks.12.mlp.hook_out") == (12, "mlp.hook_out")
    assert layer_hook("hook_embed") is None
    assert layer_hook("blocks.x.hook_out") is None
