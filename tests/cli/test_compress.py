import re
import sys

import numpy as np
import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from safetensors.torch import save_file

from bae_lens import BAE, BAEConfig, compress, read_code
from bae_lens.cli import decompress as decompress_command
from bae_lens.cli import main as cli
from bae_lens.compression import code_file

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def bae(tmp_path):
    bae = BAE(BAEConfig(d_in=16, d_sae=50))
    torch.nn.init.normal_(bae.W_dec)
    bae.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
    bae.save_model(tmp_path / "bae")
    return bae


@pytest.fixture
def vectors(tmp_path):
    vectors = torch.randn(300, 16)
    np.save(tmp_path / "x.npy", vectors.numpy())
    return vectors


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `bae-lens` and returns what it prints, and the errors."""

    def run(*arguments, status=None):
        monkeypatch.setattr(sys, "argv", ["bae-lens", *map(str, arguments)])
        if status is None:
            cli.main()
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == status
        return capsys.readouterr().err

    return run


def test_there_and_back(bae, vectors, command, tmp_path):
    ends = ("--dictionary", tmp_path / "bae", "--output")
    printed = command("compress", "--vectors", tmp_path / "x.npy", *ends, tmp_path / "x.bae")
    size = (tmp_path / "x.bae").stat().st_size
    assert f"300 vectors, {size} bytes: {8 * size / 300:.1f} bits a vector" in printed
    assert "as 16-bit numbers 256" in printed
    assert re.search(r"chunks coded: 1 by (columns|pairs|geometry)\n", printed)
    assert re.search(r"entropy of the code \d+\.\d, \d+\.\d jointly", printed)
    save_file({"x": vectors[:7].contiguous()}, tmp_path / "more.safetensors")
    command("compress", "--append", "--vectors", tmp_path / "more.safetensors", *ends, tmp_path / "x.bae")
    printed = command("decompress", "--file", tmp_path / "x.bae", *ends, tmp_path / "back.npy")
    assert printed == f"307 vectors in {tmp_path / 'back.npy'}\n"
    expected = bae(torch.cat([vectors, vectors[:7]])).detach()
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "back.npy")), expected)
    command("decompress", "--file", tmp_path / "x.bae", *ends, tmp_path / "part.npy", "--start", 5, "--stop", 9)
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "part.npy")), expected[5:9])
    assert not list(tmp_path.glob("*.partial"))


def test_two_decompressions_to_one_file_at_a_time(bae, vectors, command, tmp_path, monkeypatch):
    compress(bae, vectors, tmp_path / "x.bae")
    given = ["--file", tmp_path / "x.bae", "--dictionary", tmp_path / "bae", "--output", tmp_path / "y.npy"]
    read, seen = decompress_command.reconstructions, []

    def while_another_is_started(*arguments):
        for part in read(*arguments):
            yield part
            seen.append(command("decompress", *given, "--stop", 10, status=2))

    monkeypatch.setattr(decompress_command, "reconstructions", while_another_is_started)
    assert command("decompress", *given) == f"300 vectors in {tmp_path / 'y.npy'}\n"
    assert seen[0].endswith(
        f"error: another process is writing {tmp_path / 'y.npy'}; wait for it, or choose another file\n"
    )
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), bae(vectors).detach().numpy(), rtol=1e-5, atol=1e-5)
    assert {path.name for path in tmp_path.iterdir()} == {"bae", "x.npy", "x.bae", "y.npy"}


def test_places_that_cannot_be_written_to_are_refused_before_the_work(bae, vectors, command, tmp_path):
    compress(bae, vectors, tmp_path / "x.bae")
    (tmp_path / "folder.npy").mkdir()
    there = ["--file", tmp_path / "x.bae", "--dictionary", tmp_path / "bae", "--output"]
    assert "folder.npy is a folder; name a file" in command("decompress", *there, tmp_path / "folder.npy", status=2)
    assert "there is no folder" in command("decompress", *there, tmp_path / "none" / "y.npy", status=2)
    assert "name a .bae file" in command("decompress", "--file", tmp_path / "bae", *there[2:], "y.npy", status=2)
    back = ["--vectors", tmp_path / "x.npy", "--dictionary", tmp_path / "bae", "--output"]
    assert "there is no folder" in command("compress", *back, tmp_path / "none" / "y.bae", status=2)
    assert "ends in .bae, got" in command("compress", *back, tmp_path / "x.npy", status=2)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), vectors.numpy())


@pytest.mark.usefixtures("bae", "vectors")
def test_features_by_themselves(command, tmp_path):
    ends = ("--vectors", tmp_path / "x.npy", "--dictionary", tmp_path / "bae", "--output", tmp_path / "x.bae")
    command("compress", "--no-joint", *ends)
    with code_file.CodeFile(tmp_path / "x.bae") as file:
        assert {chunk.coding for chunk in file.chunks()} == {code_file.Coding.COLUMNS}


def test_folder_of_hidden_states(bae, states, command, tmp_path):
    _, test = states
    command("compress", "--vectors", test.folder, "--dictionary", tmp_path / "bae", "--output", tmp_path / "x.bae")
    assert torch.equal(read_code(tmp_path / "x.bae", sae=bae), bae.encode(test.rows(test.content)))


def test_damage_is_shown(bae, vectors, command, tmp_path, monkeypatch):
    monkeypatch.setattr(code_file, "CHUNK_ROWS", 100)
    compress(bae, vectors, tmp_path / "x.bae")
    content = bytearray((tmp_path / "x.bae").read_bytes())
    content[-1] ^= 1
    (tmp_path / "x.bae").write_bytes(content)
    ends = ("--file", tmp_path / "x.bae", "--dictionary", tmp_path / "bae", "--output", tmp_path / "back.npy")
    assert "vectors 200 to 299 is damaged" in command("decompress", *ends, status=2)
    assert {path.name for path in tmp_path.iterdir()} == {"x.bae", "x.npy", "bae"}
    printed = command("decompress", *ends, "--skip-damaged")
    assert "200 vectors in" in printed
    assert "damaged and left out: vectors 200 to 299" in printed
    assert np.load(tmp_path / "back.npy").shape == (200, 16)


def test_errors_of_the_users_making(bae, vectors, command, tmp_path):
    StandardSAE(StandardSAEConfig(d_in=16, d_sae=50)).save_model(tmp_path / "relu")
    compress(bae, vectors, tmp_path / "x.bae")
    file, dictionary, output = ("--file", tmp_path / "x.bae"), ("--dictionary", tmp_path / "bae"), "--output"
    x = ("--vectors", tmp_path / "x.npy")
    cases = {
        "holds a standard": ("compress", *x, "--dictionary", tmp_path / "relu", output, tmp_path / "y.bae"),
        "no saved dictionary": ("compress", *x, "--dictionary", tmp_path, output, tmp_path / "y.bae"),
        "no file": ("compress", "--vectors", tmp_path / "n.npy", *dictionary, output, tmp_path / "y.bae"),
        "there is no folder": ("compress", *x, *dictionary, output, tmp_path / "nowhere" / "y.bae"),
        "not a .bae file": ("decompress", "--file", tmp_path / "x.npy", *dictionary, output, tmp_path / "y.npy"),
        "ends in .npy": ("decompress", *file, *dictionary, output, tmp_path / "y.txt"),
        "the 300 vectors": ("decompress", *file, *dictionary, output, tmp_path / "y.npy", "--stop", 301),
    }
    for message, arguments in cases.items():
        error = command(*arguments, status=2)
        assert message in error
        assert error.splitlines()[-1].startswith("error: ")
    assert {path.name for path in tmp_path.iterdir()} == {"x.bae", "x.npy", "bae", "relu"}
