import pytest
import torch

from lilpipe.errors import ConfigError
from lilpipe.model import devices
from lilpipe.model.devices import GPUS, device_at_hand, get_device, measure_peak, mfu


def test_utilisation_is_what_was_done_over_what_could_be():
    # Llama 3 405B on 16,384 H100, section 3.3: 380 TFLOP/s on each, which it calls 38 %.
    per_gpu = 380e12
    assert mfu(16_384 * per_gpu / 2.5e12, flops_per_token=2.5e12, num_devices=16_384, peak=989.4e12) == pytest.approx(
        0.384, abs=1e-3
    )


def test_every_gpu_is_faster_the_narrower_its_numbers():
    for device in GPUS.values():
        peaks = [device.peaks[kind] for kind in ("fp32", "tf32", "bf16", "fp8") if kind in device.peaks]
        assert peaks == sorted(peaks), device.name
        assert device.source


@pytest.mark.parametrize(
    ("torch_name", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA L40", None),
        ("NVIDIA A10G", None),
        ("NVIDIA T4", None),
    ],
)
def test_a_gpu_is_known_by_the_name_that_torch_gives_it(monkeypatch, torch_name, name):
    class Properties:
        name = torch_name
        total_memory = 7

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    if name is None:
        with pytest.raises(ConfigError, match=r"unknown peak of 'NVIDIA .*'"):
            device_at_hand()
        return
    found = device_at_hand()
    assert (found.name, found.peaks, found.memory_bytes) == (name, GPUS[name].peaks, 7)


def test_a_peak_is_the_work_over_the_time_of_the_fastest_product(monkeypatch):
    times = iter([0.0, 0.0, 1.0, 3.0, 3.0, 3.5, 4.0, 9.0])  # begun; in time, from, to; in time, from, to; over
    monkeypatch.setattr(devices.time, "perf_counter", lambda: next(times))
    before = torch.get_num_threads()
    assert measure_peak(seconds=8.0) == 2 * 1024**3 / 0.5
    assert torch.get_num_threads() == before


def test_an_unknown_device_is_answered_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"budget.device: unknown device 'h10'; did you mean h100"):
        get_device("h10")


def test_arithmetic_that_a_device_lacks_is_refused_with_what_it_has():
    with pytest.raises(ConfigError, match="a100 supports only fp32, tf32, bf16"):
        get_device("a100").peak("fp8")
