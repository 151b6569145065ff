"""What batched decoding is held against: one sequence at a time, without a cache."""

from collections.abc import Sequence

import pytest
import torch

from lilpipe.config.model import ModelConfig
from lilpipe.config.sampling import SamplingConfig
from lilpipe.generation.engine import CompletionOutput
from lilpipe.generation.sampling import choose, uniforms
from lilpipe.model.transformer import Transformer

VOCAB = 40
PROMPTS = [[3], [5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [5, 6, 7, 1], [2, 2]]
SAMPLING = SamplingConfig(temperature=1.0, max_new_tokens=12, batch_size=4)
STOP = (0, 1, 2, 4)


def sharp_model() -> Transformer:
    """Far from uniform, so that a wrong cache shows."""
    config = ModelConfig(
        hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=24, max_seq_len=32
    )
    model = Transformer(config, VOCAB)
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    return model.eval()


@torch.no_grad()
def naive(
    model: Transformer,
    prompt: Sequence[int],
    *,
    index: int,
    sample: int,
    sampling: SamplingConfig,
    stop_ids: Sequence[int] = STOP,
    seed: int = 7,
) -> CompletionOutput:
    """One sequence, the whole of it through the model for each token."""
    draws = uniforms(seed, index, sample, sampling.max_new_tokens)
    tokens, logprobs = list(prompt), []
    while len(logprobs) < sampling.max_new_tokens and len(tokens) < model.config.max_seq_len:
        logits = model(torch.tensor([tokens]))[:, -1]
        draw = draws[len(logprobs)][None]
        token = int(choose(logits, draw, temperature=sampling.temperature, top_p=sampling.top_p))
        logprobs.append(float(logits.log_softmax(-1)[0, token]))
        if token in stop_ids:
            return CompletionOutput(tokens[len(prompt) :], logprobs, True)
        tokens.append(token)
    return CompletionOutput(tokens[len(prompt) :], logprobs, False)


def assert_same(got: CompletionOutput, expected: CompletionOutput, *, atol: float = 1e-5) -> None:
    assert got.tokens == expected.tokens
    assert got.finished == expected.finished
    assert got.logprobs == pytest.approx(expected.logprobs, abs=atol)
