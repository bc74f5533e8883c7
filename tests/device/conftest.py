import pytest
import sae_lens.loading.pretrained_sae_loaders
import shadow_device


@pytest.fixture(autouse=True)
def shadow(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> str:  # noqa: ARG001
    """The name of the device."""
    shadow_device.register()
    monkeypatch.setattr(sae_lens.loading.pretrained_sae_loaders, "safe_open", shadow_device.opened)
    return shadow_device.NAME
