import torch
from torch import nn

from bae_lens.activations.fingerprint import model_fingerprint, tensor_fingerprint


class Model(nn.Module):
    def __init__(self, rows: int = 2**14, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(rows * 3, dtype=dtype).view(rows, 3))
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("frequencies", torch.ones(4), persistent=False)


def test_same_content_has_the_same_fingerprint():
    assert model_fingerprint(Model()) == model_fingerprint(Model())
    assert len(model_fingerprint(Model())) == 16


def test_change_of_any_row_is_noticed():
    expected, model = model_fingerprint(Model()), Model()
    for row in (0, 5000, 2**14 - 1):
        with torch.no_grad():
            model.weight[row] += 1
            assert model_fingerprint(model) != expected
            model.weight[row] -= 1
    assert model_fingerprint(model) == expected


def test_types_shapes_names_scalars_and_buffers_count():
    expected = model_fingerprint(Model())
    others = [Model(dtype=torch.bfloat16), Model(rows=2**14 - 1), Model(), Model(), Model()]
    others[2].scale.data.fill_(3.0)
    others[3].get_buffer("frequencies")[1] = 2
    others[4].renamed = others[4].scale
    del others[4].scale
    assert expected not in {model_fingerprint(other) for other in others}


def test_every_value_of_tensors_counts():
    tokens, document = torch.arange(2**15), torch.zeros(3)
    expected = tensor_fingerprint(tokens, document)
    changed = tokens.clone()
    changed[777] += 1
    assert expected == tensor_fingerprint(tokens.clone(), document)
    assert expected not in (
        tensor_fingerprint(changed, document),
        tensor_fingerprint(tokens.int(), document),
        tensor_fingerprint(tokens.view(2, -1), document),
        tensor_fingerprint(document, tokens),
    )
