import pytest
import torch

from glactl.peaks import peak_flops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Some Card", None),
    ],
)
def test_the_peak_of_a_chip_is_known_by_its_name_or_not_at_all(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak


def test_no_peak_is_claimed_for_other_devices_and_types():
    assert peak_flops(torch.device("cpu")) is None
    assert peak_flops(torch.device("cuda"), torch.float32) is None
