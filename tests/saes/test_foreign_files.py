import pickle
import zipfile

import pytest
import torch

from bae_lens.saes.foreign_files import PICKLE_BYTES, check_pickle, load_tensors


def nested(depth):
    """A few hundred bytes of pickle that stand for 10 to the power of `depth` lists."""
    value = ["x"]
    for _ in range(depth):
        value = [value] * 10
    return value


def pair_of_pairs(depth):
    """A tuple whose hash takes 2 to the power of `depth` steps."""
    value = ("x",)
    for _ in range(depth):
        value = (value, value)
    return value


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_are_passed_whatever_comes_again(protocol):
    shared = "binarization_type"
    value = {shared: {"a": [1, 2.5, None, True, 2**70], shared: ("y", (), {})}, "list": [shared] * 3, "long": "x" * 300}
    check_pickle(pickle.dumps(value, protocol))


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("value", [nested(5), pair_of_pairs(5), {pair_of_pairs(5): 1}], ids=["list", "tuple", "key"])
def test_containers_in_several_places_are_refused(value, protocol):
    with pytest.raises(ValueError, match="one container in several places"):
        check_pickle(pickle.dumps(value, protocol))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02}X\x01\0\0\0x2\x86K\x01s.", "one container in several places"),
        (b"\x80\x02Nr\xff\xff\xff\x0f.", "counts 268435455 parts in 9 bytes"),
        (b"\x80\x05\x96" + (2**33).to_bytes(8, "little") + b".", "bytearray8"),
        (b"\x80\x05\x96" + (4).to_bytes(8, "little") + b"abcd.", "whose count it only states"),
        (b"\x80\x02c__builtin__\nbytearray\nM\xff\xff\x85R.", "whose count it only states"),
        (b"\x80\x02ctorch\nFloatTensor\nM\xff\xff\x85R.", "whose count it only states"),
        (pickle.dumps("x" * PICKLE_BYTES), "more than 16384 bytes"),
        (b"", "pickle exhausted"),
        (b"hello", "pickle exhausted"),
    ],
)
def test_what_takes_more_than_it_holds_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        check_pickle(content)


@pytest.fixture
def saved(tmp_path):
    x = torch.randn(64, 6)
    torch.save({"x": x}, tmp_path / "x.pt")
    return x, tmp_path / "x.pt"


def again(path, compression, change=lambda _, content: content):
    """The same archive, written by another tool."""
    target = path.with_name("again.pt")
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(target, "w", compression) as other:
        for entry in archive.infolist():
            other.writestr(entry.filename, change(entry.filename, archive.read(entry)))
    return target


def test_tensors_are_read_whoever_wrote_the_archive(saved):
    x, path = saved
    assert torch.equal(load_tensors(path)["x"], x)
    assert torch.equal(load_tensors(again(path, zipfile.ZIP_STORED))["x"], x)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_archive_is_refused_and_not_read_as_noise(saved, compression):
    with pytest.raises(ValueError, match="its archive was compressed, and cannot be mapped; save it anew"):
        load_tensors(again(saved[1], compression))


def test_pickle_in_an_archive_is_bounded(saved):
    bomb = pickle.dumps({"x": nested(5)}, 2)
    path = again(saved[1], zipfile.ZIP_STORED, lambda name, content: bomb if name.endswith("data.pkl") else content)
    with pytest.raises(ValueError, match="one container in several places"):
        load_tensors(path)


def test_values_beyond_what_is_stored_are_refused(tmp_path):
    for value in (torch.zeros(1).expand(10**6, 10**6), {"x": torch.zeros(3).as_strided((10**9, 3), (0, 1))}):
        torch.save(value, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=r"its tensor of shape \(10000*, \d+\) repeats its values"):
            load_tensors(tmp_path / "x.pt")


def test_views_of_what_is_stored_are_read(tmp_path):
    x = torch.randn(8, 6)
    torch.save([x.T, x[::2]], tmp_path / "x.pt")
    transposed, every_other = load_tensors(tmp_path / "x.pt")
    assert torch.equal(transposed, x.T)
    assert torch.equal(every_other, x[::2])
