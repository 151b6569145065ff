import pytest
import torch

from tests.benchmarks import gpu


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_runs_at_toy_size_on_a_cpu(capsys):
    gpu.run("toy", torch.device("cpu"), rounds=1, num_steps=1, checkpointing="selective")
    lines = capsys.readouterr().out.splitlines()
    for system in ("lilpipe", "transformers, eager", "transformers, compiled"):
        (line,) = (line for line in lines if line.startswith(f"  {system} "))
        assert "tokens/s" in line
        assert "MFU" in line
