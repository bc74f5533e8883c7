import pytest
import torch

from bae_lens.functional.packing import pack_code, unpack_code


@pytest.mark.parametrize("d_sae", [1, 7, 8, 9, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_code_comes_back_from_its_bits(d_sae, dtype):
    code = (torch.rand(3, 5, d_sae) < 0.3).to(dtype)

    packed = pack_code(code)

    assert packed.shape == (3, 5, (d_sae + 7) // 8)
    assert unpack_code(packed, d_sae, dtype).equal(code)


def test_first_feature_is_the_highest_bit():
    assert pack_code(torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 1, 1])).tolist() == [0b10000001, 0b10000000]


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0])
def test_refuses_what_is_not_binary(value):
    with pytest.raises(ValueError, match="only a binary code can be packed"):
        pack_code(torch.tensor([[0.0, value]]))


def test_refuses_bytes_of_another_width():
    with pytest.raises(ValueError, match="9 features are packed into 2 bytes, got 1"):
        unpack_code(torch.zeros(4, 1, dtype=torch.uint8), 9)
