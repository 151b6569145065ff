"""vLLM (Kwon et al. 2023) behind the interface of ``generate``: the extra ``vllm``, on a GPU.

The engine starts once for each shape of model, in this process and with weights of its own that mean nothing; before
each call the model's are handed to its workers (``collective_rpc`` and vLLM's ``load_weights``), so that a policy in
training is sampled without a restart. Log-probabilities are vLLM's raw ones: before temperature and filters. They are
computed by other kernels than the trainer's, often in a narrower type, so what takes them for the policy's own should
watch the gap. Seeds are vLLM's too: its samples are not those of the native engine.

Written against vLLM's documentation (0.8 and later) and tested against a stand-in of its API: no GPU was at hand.
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
from lilpipe.model.state_dict_adapters import Lilpipe, adapter_for
from lilpipe.model.transformer import Transformer
from lilpipe.seeds import derive_seed
from lilpipe.tokenizer.encoding import Tokenizer

MEMORY_SHARE = 0.4
"""Of the GPU's memory, for vLLM's weights and cache: the rest is the trainer's."""
SEEDS = 2**31
"""vLLM takes seeds below this, and adds the sample's number."""

_started: dict[str, Any] = {}
"""Engines by the shape that they were started for."""


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
    """As ``engine.generate``; ``rooms`` are the most tokens that a completion to each prompt can have.

    Raises ``ConfigError`` where vLLM is not installed or does not know the model.
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
    """Record the tokens as if they were drawn here: what ends a completion is then the same for both engines."""
    for token, likely in zip(completion.token_ids, completion.logprobs, strict=True):
        if row.record(token, likely[token].logprob):
            return


def hand_over(engine: Any, model: Transformer) -> None:
    """Give the engine the model's weights, and let it forget what it has cached under others."""
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    engine.collective_rpc(_load, args=(list(adapter_for(model.config).to_hf(tensors).items()),))
    engine.reset_prefix_cache()


def _load(worker: Any, tensors: list[tuple[str, Tensor]]) -> None:
    """In a worker of vLLM's: overwrite its weights."""
    worker.model_runner.model.load_weights(tensors)


def _import() -> Any:
    # The engine in this process: a worker elsewhere would be sent the weights as bytes.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise ConfigError(
            "sampling.engine: got 'vllm', and vllm is not installed; install lilpipe[vllm] on a machine with a GPU, or "
            "take engine = 'native'"
        ) from error


def _engine(vllm: Any, model: Transformer, sampling: SamplingConfig) -> Any:
    """The engine for this shape of model, started on first use."""
    config, layout = model.config, adapter_for(model.config)
    if isinstance(layout, Lilpipe):
        raise ConfigError(
            "sampling.engine: got 'vllm', and no architecture that vllm knows computes this model (logit_softcap, or a "
            "mixture of options); take engine = 'native'"
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
