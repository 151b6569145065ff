"""vLLM (Kwon et al. 2023) behind the interface of ``generate``: extra ``vllm``, requires a GPU.

The engine starts once per model architecture, in this process, with dummy weights. Before each call the model's weights
are sent to its workers (``collective_rpc`` and vLLM's ``load_weights``), so a policy in training is sampled without a
restart. Log-probabilities are vLLM's raw ones, before temperature and filters. Other kernels than the trainer's compute
them, often in a narrower dtype: code that uses them as the policy's should monitor the difference. Seeds are vLLM's:
its completions differ from the native engine's.

Written for vLLM's documentation (0.8 and later) and tested with a fake of its API, not on a GPU.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lilpipe.config.sampling import SamplingConfig
from lilpipe.errors import ConfigError
from lilpipe.generation.requests import CompletionOutput, Row
from lilpipe.generation.requests import Request as Answers
from lilpipe.generation.text import token_bytes
from lilpipe.model.lora import merged_tensors
from lilpipe.model.state_dict_adapters import Lilpipe, adapter_for
from lilpipe.model.transformer import Transformer
from lilpipe.seeds import derive_seed
from lilpipe.tokenizer.encoding import Tokenizer

MEMORY_SHARE = 0.4
"""Fraction of GPU memory for vLLM's weights and KV cache; the rest is for the trainer."""
SEEDS = 2**31
"""vLLM requires seeds below this, and adds the completion's index to the seed."""

_started: dict[str, Any] = {}
"""Engines by the architecture that they were started for."""


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    numbers: Sequence[int],
    sampling: SamplingConfig,
    stop_ids: Collection[int],
    seed: int,
    num_generations: int,
    rooms: Sequence[int],
    tokenizer: Tokenizer | None,
) -> list[list[CompletionOutput]]:
    """Generate as ``engine.generate`` does; ``rooms`` are the maximum numbers of completion tokens for each prompt.

    Raises ``ConfigError`` if vLLM is not installed or does not support the model.
    """
    vllm = _import()
    engine = _engine(vllm, model, sampling)
    hand_over(engine, model)
    settings = [
        vllm.SamplingParams(
            n=num_generations,
            temperature=sampling.temperature,
            top_k=sampling.top_k or -1,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            max_tokens=room,
            stop_token_ids=sorted(stop_ids),
            ignore_eos=True,
            seed=derive_seed(seed, "vllm", index) % (SEEDS - num_generations),
            logprobs=0,
            detokenize=False,
        )
        for index, room in zip(numbers, rooms, strict=True)
    ]
    outputs = engine.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], settings, use_tqdm=False)
    vocabulary = token_bytes(tokenizer) if sampling.stop and tokenizer else []
    answers = [
        Answers(
            prompt=list(prompt),
            sampling=sampling,
            stop_ids=frozenset(stop_ids),
            seed=seed,
            index=index,
            room=room,
            samples=[CompletionOutput([], [], finished=False) for _ in range(num_generations)],
            vocabulary=vocabulary,
        )
        for index, prompt, room in zip(numbers, prompts, rooms, strict=True)
    ]
    for request, output in zip(answers, outputs, strict=True):
        for completion in output.outputs:
            _replay(Row(request, completion.index), completion)
    return [request.samples for request in answers]


def _replay(row: Row, completion: Any) -> None:
    """Record the tokens as if sampled by the native engine, so that both engines end completions in the same way."""
    for token, likely in zip(completion.token_ids, completion.logprobs, strict=True):
        if row.record(token, likely[token].logprob):
            return


def hand_over(engine: Any, model: Transformer) -> None:
    """Send the model's weights to the engine, with adapters merged into them, and reset its prefix cache."""
    tensors = {name: tensor.detach() for name, tensor in merged_tensors(model)}
    engine.collective_rpc(_load, args=(list(adapter_for(model.config).to_hf(tensors, model.config).items()),))
    engine.reset_prefix_cache()


def _load(worker: Any, tensors: list[tuple[str, Tensor]]) -> None:
    """Overwrite the weights of a vLLM worker; runs in the worker."""
    worker.model_runner.model.load_weights(tensors)


def _import() -> Any:
    # Run the engine in this process: to another process, weights would be sent as bytes.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise ConfigError(
            "sampling.engine: got 'vllm', but vllm is not installed; install lilpipe[vllm] on a machine with a GPU, or "
            "set engine = 'native'"
        ) from error


def _engine(vllm: Any, model: Transformer, sampling: SamplingConfig) -> Any:
    """Return the engine for this model architecture; start it on first use."""
    config, layout = model.config, adapter_for(model.config)
    if isinstance(layout, Lilpipe):
        raise ConfigError(
            "sampling.engine: got 'vllm', but vllm has no architecture that computes this model (logit_softcap, or a "
            "combination of options); set engine = 'native'"
        )
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    stated = {
        "architectures": [layout.class_name],
        "model_type": layout.model_type,
        "vocab_size": model.vocab_size,
        "torch_dtype": dtype,
        **layout.write(config),
    }
    key = json.dumps([stated, sampling.batch_size], sort_keys=True)
    if key not in _started:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(stated))
            _started[key] = vllm.LLM(
                model=folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                dtype=dtype,
                max_model_len=config.max_seq_len,
                max_num_seqs=sampling.batch_size,
                gpu_memory_utilization=MEMORY_SHARE,
                enable_prefix_caching=True,
                logprobs_mode="raw_logprobs",
            )
    return _started[key]
