"""Run by ``test_memory.py`` under torchrun: what one step allocates at most in each layout, on each of two workers."""

import gc
import json
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

VOCAB = 512
SEQ_LEN = 128
SHAPE = {
    "hidden_size": 128,
    "num_layers": 8,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 352,
    "max_seq_len": SEQ_LEN,
}
LAYOUTS = {
    "shard": {"parallel": {"shard": 2}},
    "shard, two micro-batches": {"parallel": {"shard": 2}, "accumulation_steps": 2},
    "shard, bf16": {"parallel": {"shard": 2}, "precision": "bf16"},
    "shard, blocks again": {"parallel": {"shard": 2}, "activation_checkpointing": "full"},
    "tensor": {"parallel": {"tensor": 2}},
    "context": {"parallel": {"context": 2}},
    "pipeline": {"parallel": {"pipeline": 2}, "accumulation_steps": 4},
    "interleaved": {
        "parallel": {"pipeline": 2, "stages_per_worker": 2, "schedule": "interleaved"},
        "accumulation_steps": 4,
    },
}


def config(name):
    from lilpipe.config.training import PretrainConfig

    values = {"seed": 0, "model": SHAPE, "batch_size": 8, "num_workers": 2, **LAYOUTS[name]}
    return PretrainConfig.model_validate(values)


def peak_bytes(work, path):
    """Most bytes at once that torch allocated in ``work`` and had not freed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    profiler.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    assert events
    held, most = 0, 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most


def measure(name, path):
    """The peak of a step, and the bytes of weights on this worker."""
    from lilpipe.tokens.loader import Batch
    from lilpipe.training.build_sharded import parallelize
    from lilpipe.training.replica import Loss

    section = config(name)
    num_rows = section.batch_size // (section.layout.data * section.accumulation_steps)

    def batches(step):
        tokens_BT = torch.arange(num_rows * SEQ_LEN).view(num_rows, SEQ_LEN) % VOCAB
        positions_BT = torch.arange(SEQ_LEN).expand(num_rows, -1).contiguous()
        return [Batch(tokens_BT, tokens_BT, torch.zeros_like(tokens_BT), positions_BT)] * section.accumulation_steps

    def loss(scores, batch):
        return Loss(-scores.logprobs.sum(), batch.targets.numel(), batch.targets.numel())

    model = parallelize(
        section, section.model, VOCAB, batches=batches, loss=loss, intra_document_masking=section.intra_document_masking
    )

    def step():
        model.zero_grad()
        model.forward_backward(0)

    step()
    model.zero_grad()
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in model.tensors().values()]
    return {"peak": peak_bytes(step, path), "weights": 4 * sum(tensor.numel() for tensor in local)}


def main(root):
    from lilpipe import distributed

    distributed.init()
    report = {}
    for name in LAYOUTS:
        report[name] = measure(name, root / f"trace{distributed.rank()}.json")
        gc.collect()
    (root / f"rank{distributed.rank()}.json").write_text(json.dumps(report))
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
