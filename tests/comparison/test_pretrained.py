from dataclasses import replace

import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig

from bae_lens import Comparison, Contender, Experiment, Vectors, compare, compare_vectors
from bae_lens.activations.vectors import VECTORS_HOOK
from bae_lens.comparison.config_file import read_specs
from bae_lens.comparison.dictionaries import PretrainedSpec
from bae_lens.comparison.experiment import Pretrained
from bae_lens.report.card import write_cards
from bae_lens.report.page import write_report
from tests.comparison.test_run import EXPERIMENT, HOOK, HOOK_IN, HOOK_OUT, bae, relu, timeless, transcoder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def trained(tiny_model, tiny_dataset, tmp_path):
    """A comparison, and the folder of its dictionaries."""
    contenders = {"BAE": Contender((bae(),)), "Transcoder": Contender((transcoder(),), HOOK_IN, HOOK_OUT)}
    return compare(
        tiny_model, tiny_dataset, contenders, EXPERIMENT, tmp_path / "first"
    ), tmp_path / "first/dictionaries"


def contender(source, **hooks):
    return PretrainedSpec(str(source), **hooks).contender_by_width(lambda _: {}, HOOK, 4, 10)


def test_they_are_measured_as_those_that_are_trained(trained, tiny_model, tiny_dataset, tmp_path):
    first, folder = trained
    theirs = {name: contender(folder / name) for name in ("BAE", "Transcoder")}
    experiment = replace(EXPERIMENT, seeds=(0, 1))
    given = (tiny_model, tiny_dataset, {**theirs, "ReLU": Contender((relu(),))}, experiment, tmp_path / "second")
    result = compare(*given)
    assert [(d.name, d.pretrained, len(d.runs)) for d in result.dictionaries] == [
        ("BAE", str(folder / "BAE"), 1),
        ("Transcoder", str(folder / "Transcoder"), 1),
        ("ReLU", None, 2),
    ]
    for known, found in zip(first.dictionaries, result.dictionaries, strict=False):
        assert found.runs[0].metrics == known.runs[0].metrics
        assert found.runs[0].language_model == known.runs[0].language_model
        assert found.features == known.features
        assert (found.architecture, found.hook_name, found.hook_name_out, found.d_sae) == (
            known.architecture, known.hook_name, known.hook_name_out, known.d_sae
        )  # fmt: skip
        assert (found.recipe, found.trials, found.runs[0].curve) == ({}, [], [])
        assert found.runs[0].training_seconds is found.runs[0].memory_gib is None
    assert Comparison.from_dict(result.to_dict()) == result
    row = result.table().splitlines()[2]
    assert "| pretrained | - |" in row
    assert write_cards(result, tmp_path / "second") == [
        tmp_path / "second" / place / "ReLU" / "README.md" for place in ("dictionaries", "seeds/1/dictionaries")
    ]
    page = write_report(result, tmp_path / "second").read_text()
    assert "Pretrained, on other or more tokens" in page
    assert str(folder) not in page


def test_a_second_start_does_nothing_again(trained, tiny_model, tiny_dataset, tmp_path, monkeypatch):
    folder = trained[1]
    given = (tiny_model, tiny_dataset, {"Theirs": contender(folder / "BAE")}, EXPERIMENT, tmp_path / "second")
    result = compare(*given)
    other, unlike = contender(folder / "BAE"), contender(folder / "BAE")
    assert other.pretrained
    assert unlike.pretrained
    unlike.pretrained.sae.cfg.max_flips = 3
    other.pretrained.sae.W_dec.data += 1
    monkeypatch.setattr("bae_lens.comparison.comparing.evaluate_dictionary", lambda *_, **__: pytest.fail("done again"))
    assert timeless(compare(*given)) == timeless(result)
    with pytest.raises(ValueError, match=r"holds something else \(recipes\.Theirs\.weights: "):
        compare(*given[:2], {"Theirs": other}, *given[3:])
    with pytest.raises(ValueError, match=r"holds something else \(recipes\.Theirs\.max_flips: "):
        compare(*given[:2], {"Theirs": unlike}, *given[3:])


def test_where_it_is_measured_can_be_said(trained, tiny_model, tiny_dataset, tmp_path):
    folder = trained[1]
    other = replace(EXPERIMENT, hook_name=HOOK_IN)
    run = lambda made, name: compare(tiny_model, tiny_dataset, {"Theirs": made}, other, tmp_path / name)  # noqa: E731
    with pytest.raises(ValueError, match=rf"Theirs .*reads {HOOK}, and the comparison is at {HOOK_IN}; compare there"):
        run(contender(folder / "BAE"), "refused")
    here = run(contender(folder / "BAE", hook_name=HOOK_IN), "here")
    assert here.dictionaries[0].hook_name == HOOK_IN
    there = run(contender(folder / "BAE", hook_name=HOOK), "there").dictionaries[0]
    assert there.hook_name == there.hook_name_out == HOOK
    assert there.runs[0].metrics == trained[0].dictionaries[0].runs[0].metrics
    assert there.runs[0].language_model == trained[0].dictionaries[0].runs[0].language_model
    assert here.dictionaries[0].runs[0].language_model != there.runs[0].language_model
    assert here.dictionaries[0].runs[0].metrics != there.runs[0].metrics


def test_beside_vectors(tmp_path):
    cfg = StandardSAEConfig(d_in=8, d_sae=16)
    sae = StandardSAE(cfg)
    sae.cfg.metadata.hook_name = VECTORS_HOOK
    sae.save_model(tmp_path / "sae")
    vectors = Vectors([torch.randn(900, 8)])
    experiment = Experiment(None, "x", VECTORS_HOOK)
    made = {"Theirs": contender(tmp_path / "sae")}
    assert compare_vectors(vectors, made, experiment, tmp_path / "run").dictionaries[0].pretrained == str(
        tmp_path / "sae"
    )
    sae.cfg.metadata.hook_name = HOOK
    with pytest.raises(ValueError, match=f"Theirs .* reads {HOOK}, and the comparison is at vectors"):
        compare_vectors(
            vectors, {"Theirs": Contender((), HOOK, HOOK, Pretrained("x", sae))}, experiment, tmp_path / "no"
        )


def test_what_cannot_be_measured_is_refused(tiny_model, tiny_dataset, tmp_path, monkeypatch):
    sae = StandardSAE(StandardSAEConfig(d_in=12, d_sae=16))
    sae.save_model(tmp_path / "narrow")
    with pytest.raises(ValueError, match="narrow does not say which hook it reads"):
        contender(tmp_path / "narrow")
    narrow = contender(tmp_path / "narrow", hook_name=HOOK)
    with pytest.raises(ValueError, match=rf"Theirs has d_in 12, but the activations at {HOOK} are 16 wide"):
        compare(tiny_model, tiny_dataset, {"Theirs": narrow}, EXPERIMENT, tmp_path / "run")
    with pytest.raises(ValueError, match="only transcoders take hook_name_out"):
        contender(tmp_path / "narrow", hook_name=HOOK, hook_name_out=HOOK)
    sae.cfg.normalize_activations = "expected_average_only_in"
    sae.save_model(tmp_path / "scaled")
    with pytest.raises(ValueError, match=r"scaled takes activations that are normalized \(expected_average_only_in\)"):
        contender(tmp_path / "scaled", hook_name=HOOK)
    with pytest.raises(ValueError, match="is pretrained, and takes no trials, got 1"):
        Contender((bae(),), pretrained=narrow.pretrained)

    def unreachable(*_):
        raise OSError("no network")

    monkeypatch.setattr(SAE, "from_pretrained", unreachable)
    with pytest.raises(ValueError, match=r"gpt2/x is no folder, and not to be had .*\(OSError: no network\)"):
        contender("gpt2/x")
    with pytest.raises(ValueError, match="a dictionary is a folder or RELEASE/SAE_ID on the hub, got 'nowhere'"):
        contender("nowhere")
    assert not (tmp_path / "run").exists()


def test_in_a_file(tmp_path):
    path = tmp_path / "of.yaml"
    path.write_text("dictionaries: {Theirs: {pretrained: gpt2/x, hook_name: a}, Ours: {architecture: bae}}")
    _, specs = read_specs(path)
    assert specs["Theirs"] == PretrainedSpec("gpt2/x", "a")
    path.write_text("dictionaries: {Theirs: {pretrained: gpt2/x, lr: 1}}")
    with pytest.raises(ValueError, match="dictionary 'Theirs' takes hook_name, hook_name_out, pretrained, got"):
        read_specs(path)
