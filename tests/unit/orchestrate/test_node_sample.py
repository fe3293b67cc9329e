"""What a node is doing: numbers of this machine, and GPUs from what nvidia-smi prints."""

from __future__ import annotations

from pathlib import Path

from dist_ft.orchestrate.node_sample import EVERY_S, NodeSampler, parse_gpus


def test_this_machine_is_sampled_when_it_is_time(tmp_path: Path) -> None:
    sampler = NodeSampler(tmp_path, now=100.0)
    assert sampler.sample(100.0 + EVERY_S / 2) is None
    numbers = sampler.sample(100.0 + EVERY_S)
    assert numbers is not None
    assert {"cpu_percent", "memory_percent", "disk_percent", "network_sent_mb_s"} <= numbers.keys()
    assert all(number >= 0 for number in numbers.values())
    assert numbers["memory_used_gib"] > 0
    assert sampler.sample(101.0 + EVERY_S) is None
    assert NodeSampler(tmp_path / "not-there", 0.0).sample(60.0) is not None


def test_gpus_are_read_and_what_they_do_not_say_is_left_out() -> None:
    text = "0, 97, 71234, 61, 612.40\n1, 3, 512, 30, [N/A]\n"
    assert parse_gpus(text) == {
        "gpu0_utilization_percent": 97.0, "gpu0_memory_mib": 71234.0, "gpu0_temperature_c": 61.0, "gpu0_power_w": 612.4,
        "gpu1_utilization_percent": 3.0, "gpu1_memory_mib": 512.0, "gpu1_temperature_c": 30.0,
    }  # fmt: skip
    assert parse_gpus("") == {}
