import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file

from bae_lens import BAE, load_authors_checkpoint
from bae_lens.saes.authors_checkpoint import read_plain_pickle

VARIANT = {"binarization_type": "sign", "output_activation": "none"}


class Exploit:
    """Creates a file when it is unpickled by a reader that calls what a pickle names."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def weights():
    return {
        "encoder.weight": torch.randn(6, 3),
        "encoder.bias": torch.randn(6),
        "decoder.weight": torch.randn(3, 6),
        "decoder.bias": torch.randn(3),
    }


@pytest.fixture
def checkpoint(tmp_path, weights):
    path = tmp_path / "model.pt"
    torch.save(weights, path)
    return path


@pytest.mark.parametrize("variant", ["sign", "sign_s"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-15), ("float32", 1e-6)])
def test_gives_the_code_and_reconstruction_of_the_authors_code(golden, variant, dtype, tolerance):
    expected = load_file(golden / f"{variant}.safetensors")

    bae = load_authors_checkpoint(golden / f"{variant}.pt", dtype=dtype)
    code = bae.encode(expected["x"])

    assert bae.W_enc.dtype == bae.dtype == code.dtype == getattr(torch, dtype)
    assert code.double().equal(expected["code"])
    torch.testing.assert_close(bae.decode(code).double(), expected["reconstruction"], rtol=0, atol=tolerance)


def test_result_is_an_ordinary_bae(checkpoint, tmp_path):
    bae = load_authors_checkpoint(str(checkpoint))

    assert (bae.cfg.d_in, bae.cfg.d_sae, bae.prior.tolist()) == (3, 6, [0] * 6)
    bae.save_model(tmp_path / "bae")
    x = torch.randn(5, 3)
    assert BAE.load_from_disk(tmp_path / "bae")(x).equal(bae(x))


def test_missing_config_is_fine(checkpoint, weights):
    assert load_authors_checkpoint(checkpoint).W_dec.equal(weights["decoder.weight"].T)


def test_missing_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nothing.pt"):
        load_authors_checkpoint(tmp_path / "nothing.pt")


def test_malicious_weights_are_refused_without_running(tmp_path):
    torch.save({"encoder.weight": Exploit(tmp_path / "created")}, tmp_path / "model.pt")

    with pytest.raises(ValueError, match=r"model.pt is not a readable state dict"):
        load_authors_checkpoint(tmp_path / "model.pt")

    assert not (tmp_path / "created").exists()


@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint", b"PK\x03\x04" + bytes(100)], ids=["empty", "text", "zip"]
)
def test_garbage_weights_are_refused(tmp_path, content):
    (tmp_path / "model.pt").write_bytes(content)

    with pytest.raises(ValueError, match=r"model.pt is not a readable state dict"):
        load_authors_checkpoint(tmp_path / "model.pt")


def test_truncated_weights_are_refused(checkpoint):
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])

    with pytest.raises(ValueError, match=r"model.pt is not a readable state dict"):
        load_authors_checkpoint(checkpoint)


@pytest.mark.parametrize("change", [{"encoder.bias": None}, {"extra": torch.zeros(1)}], ids=["missing", "extra"])
def test_other_keys_are_refused(tmp_path, weights, change):
    state = {key: value for key, value in {**weights, **change}.items() if value is not None}
    torch.save(state, tmp_path / "model.pt")

    with pytest.raises(
        ValueError, match=r"must hold exactly encoder\.weight, encoder\.bias, decoder\.weight, decoder\.bias"
    ):
        load_authors_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "content",
    [
        [1],
        7,
        torch.zeros(2, 2),
        {1: 2, "a": 3},
    ],
    ids=["list", "int", "tensor", "keys"],
)
def test_anything_but_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "model.pt")

    with pytest.raises(ValueError, match=r"model.pt must hold exactly"):
        load_authors_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "change",
    [{"decoder.weight": torch.zeros(6, 3)}, {"encoder.weight": torch.zeros(3)}, {"encoder.bias": 1.0}],
    ids=["transposed", "flat", "number"],
)
def test_weights_of_other_shapes_are_refused(tmp_path, weights, change):
    torch.save({**weights, **change}, tmp_path / "model.pt")

    with pytest.raises(ValueError, match=r"model.pt"):
        load_authors_checkpoint(tmp_path / "model.pt")


def test_malicious_config_is_refused_without_running(checkpoint, tmp_path):
    exploit = pickle.dumps({"params": {**VARIANT, "x": Exploit(tmp_path / "created")}})
    checkpoint.with_suffix(".config.pkl").write_bytes(exploit)

    with pytest.raises(ValueError, match=r"model.config.pkl is refused as a config: it names (_?io|builtins)\.open"):
        load_authors_checkpoint(checkpoint)

    assert not (tmp_path / "created").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_pickle_protocol_runs_code(tmp_path, protocol):
    (tmp_path / "config.pkl").write_bytes(pickle.dumps(Exploit(tmp_path / "created"), protocol))

    with pytest.raises(ValueError, match="a config holds plain values only"):
        read_plain_pickle(tmp_path / "config.pkl")

    assert not (tmp_path / "created").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b".",
        b"\x80\xff.",
        b"(dp0\nS'a'\np1\nI1\ns",
        b"}]Ns.",
        b"\x8e" + b"\xff" * 8 + b".",
    ],
    ids=["empty", "text", "no stack", "protocol", "truncated", "unhashable key", "too large"],
)
def test_garbage_config_is_refused(tmp_path, content):
    (tmp_path / "config.pkl").write_bytes(content)

    with pytest.raises(ValueError, match=r"config.pkl is refused as a config"):
        read_plain_pickle(tmp_path / "config.pkl")


def test_plain_values_are_read(tmp_path):
    value = {"params": {"a": 1, "b": 2.5, "c": [None, True, "x"], "d": (b"y", {1})}}
    (tmp_path / "config.pkl").write_bytes(pickle.dumps(value, 4))

    assert read_plain_pickle(tmp_path / "config.pkl") == value


@pytest.mark.parametrize(
    "config",
    [
        {"params": {**VARIANT, "binarization_type": "squarewave"}},
        {"params": {**VARIANT, "output_activation": "sigmoid"}},
        {"params": {}},
        {"params": []},
        {},
        [1],
    ],
    ids=["step", "output", "no params", "list params", "empty", "list"],
)
def test_variants_that_a_bae_cannot_represent_are_refused(checkpoint, config):
    checkpoint.with_suffix(".config.pkl").write_bytes(pickle.dumps(config))

    with pytest.raises(ValueError, match="only sign and sign_s with output_activation 'none' can be read as a BAE"):
        load_authors_checkpoint(checkpoint)


def test_nested_config_is_refused_in_one_short_sentence(checkpoint):
    deep = b"\x80\x02}X\x06\0\0\0params}X\x11\0\0\0binarization_type)" + b"\x85" * 15_000 + b"ss."
    for content in (deep, pickle.dumps({"params": {**VARIANT, "binarization_type": "sign" * 2000}})):
        checkpoint.with_suffix(".config.pkl").write_bytes(content)
        with pytest.raises(
            ValueError, match="only sign and sign_s with output_activation 'none' can be read"
        ) as refused:
            load_authors_checkpoint(checkpoint)
        assert len(str(refused.value)) < 400


def test_config_can_lie_elsewhere(checkpoint, golden, tmp_path):
    shutil.copy(golden / "sign.config.pkl", tmp_path / "good.pkl")
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"params": {**VARIANT, "binarization_type": "tanh"}}))

    assert load_authors_checkpoint(checkpoint, tmp_path / "good.pkl").cfg.d_sae == 6
    with pytest.raises(ValueError, match=r"bad.pkl says binarization_type 'tanh'"):
        load_authors_checkpoint(checkpoint, tmp_path / "bad.pkl")


def test_a_config_that_is_named_must_exist(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pkl"):
        load_authors_checkpoint(checkpoint, tmp_path / "nothing.pkl")
