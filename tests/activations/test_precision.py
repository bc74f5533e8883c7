import pytest
import torch

from bae_lens.activations.precision import DTYPES, as_tensor, check_dtype, stored, torch_dtype


@pytest.mark.parametrize("name", DTYPES)
def test_what_is_written_comes_back_in_its_dtype(name):
    x = torch.tensor([[1.0, -2.5], [1 / 3, 1e-3]])
    back = as_tensor(stored(x, name), name)
    assert back.dtype == torch_dtype(name)
    assert torch.equal(back, x.to(torch_dtype(name)))


def test_bfloat16_is_kept_by_its_bits():
    assert stored(torch.tensor([1.0, -2.0]), "bfloat16").tolist() == [0x3F80, 0xC000]


def test_numbers_beyond_the_dtype_are_refused():
    assert stored(torch.tensor([65504.0, 1e5]), "bfloat16").size == 2
    with pytest.raises(
        ValueError, match=r"up to 1e\+05 do not fit in float16, which ends at 6.55e\+04; cache them in b"
    ):
        stored(torch.tensor([65504.0, 1e5]), "float16")


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="must be one of float32, bfloat16, float16, got 'int8'"):
        torch_dtype("int8")


def test_a_dtype_that_a_device_cannot_do_is_refused_in_a_sentence():
    for name in DTYPES:
        check_dtype(name, "cpu")
    with pytest.raises(ValueError, match=r"the device meta cannot compute in bfloat16: .*; choose another dtype"):
        check_dtype("bfloat16", "meta")
