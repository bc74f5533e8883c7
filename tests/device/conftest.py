from typing import Any

import pytest
import sae_lens.loading.pretrained_sae_loaders
import shadow_device
from torch import Tensor
from transformer_lens import HookedTransformer


@pytest.fixture(autouse=True)
def shadow(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> str:  # noqa: ARG001
    """The name of the device, which libraries do not know that they need to know."""
    shadow_device.register()
    monkeypatch.setattr(sae_lens.loading.pretrained_sae_loaders, "safe_open", shadow_device.opened)
    monkeypatch.setitem(HookedTransformer.forward.__globals__, "type", _type)  # it asks for torch's own class
    return shadow_device.NAME


def _type(value: Any) -> Any:
    return Tensor if isinstance(value, shadow_device.ShadowTensor) else type(value)
