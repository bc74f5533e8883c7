"""The shadow device itself: right where a GPU would be right, and an error where it would be one."""

import io

import numpy as np
import pytest
import torch
from shadow_device import ShadowTensor


@pytest.fixture
def x(shadow):
    return torch.arange(6.0).view(2, 3).to(shadow)


def test_it_computes_what_the_cpu_does_and_stays_on_the_device(x, shadow):
    w = torch.eye(3, device=shadow).requires_grad_()
    y = (x @ w).square().sum()
    y.backward()
    assert isinstance(y, ShadowTensor)
    assert isinstance(w.grad, ShadowTensor)
    assert (y.device.type, w.grad.device.type) == (shadow, shadow)
    assert y.item() == 55
    expected = 2 * x.cpu().T @ x.cpu()
    assert torch.equal(w.grad.cpu(), expected)
    assert type(y.cpu()) is torch.Tensor


def test_a_view_that_is_written_to_changes_what_it_is_of(x):
    x[:, 0] = 7
    x[1].mul_(2)
    assert x.tolist() == [[7, 1, 2], [14, 8, 10]]


@pytest.mark.parametrize(
    "crossing",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.ones(3) + x,
        lambda x: torch.cat([x, torch.ones(1, 3)]),
        lambda x: torch.zeros(2, 3).add_(x),
        lambda x: torch.zeros(()).add_(x.sum()),
        lambda x: x @ torch.ones(3, 1),
        lambda x: torch.isin(x, torch.ones(3)),
        lambda x: x.normal_(generator=torch.Generator()),
        lambda x: torch.rand(3, device=x.device, generator=torch.Generator()),
        lambda x: x.long() @ x.long().T,
        lambda x: torch.ones(2, 3).index_select(0, x[0].long()),
    ],
)
def test_what_is_not_on_the_device_is_refused(x, crossing):
    with pytest.raises(RuntimeError, match=r"on the device shadow|on cpu"):
        crossing(x)


@pytest.mark.parametrize("left", [lambda x: x.numpy(), np.asarray, lambda x: torch.from_numpy(np.array(x))])
def test_values_leave_it_only_by_being_sent_for(x, left):
    with pytest.raises((RuntimeError, TypeError), match=r"numpy|subclasses"):
        left(x)
    assert x.cpu().numpy().sum() == 15


def test_single_numbers_and_indices_on_the_cpu_are_taken_as_cuda_takes_them(x):
    assert (x * torch.tensor(2.0)).tolist() == [[0, 2, 4], [6, 8, 10]]
    assert x[torch.tensor([1])].tolist() == [[3, 4, 5]]


def test_modules_optimizers_and_checkpoints_live_on_it(x, shadow):
    module = torch.nn.Linear(3, 2).to(shadow)
    optimizer = torch.optim.Adam(module.parameters(), fused=True)
    module(x).sum().backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    assert all(parameter.device.type == shadow for parameter in module.parameters())
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, map_location=shadow)["state"][0]
    assert {name: value.device.type for name, value in state.items()} == dict.fromkeys(state, shadow)
    assert torch.equal(state["exp_avg"].cpu(), optimizer.state[module.weight]["exp_avg"].cpu())
