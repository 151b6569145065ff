"""Bits per byte of reference completions, against sums of log-probabilities."""

import math
from dataclasses import replace

import pytest
import torch

from lilpipe.evaluation.candidates import reference_bits
from lilpipe.evaluation.estimates import gains, score
from lilpipe.schemas.examples import Prompt
from lilpipe.schemas.messages import Message
from lilpipe.tokenizer.chat_template import render_completion
from tests.model.checkpoints import small_model, small_tokenizer

PROMPT = Prompt("p/0", "mine", "what?", "the thing", reference="the thing in ä", verifier="none")


def test_bits_are_those_of_the_completion_and_its_end_alone():
    model, tokenizer = small_model(), small_tokenizer()
    messages: list[Message] = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": PROMPT.reference}]
    before, after = render_completion(tokenizer, messages)
    with torch.inference_mode():
        logprobs = model(torch.tensor([before + after])).log_softmax(-1)[0].double()
    expected = -sum(logprobs[len(before) + n - 1, token].item() for n, token in enumerate(after))
    assert after[-1] == tokenizer.turn_end_id
    assert reference_bits(model, tokenizer, PROMPT) == pytest.approx(expected / math.log(2) / 15, rel=1e-5)


def test_without_a_reference_or_room_there_are_none():
    model, tokenizer = small_model(), small_tokenizer()
    assert reference_bits(model, tokenizer, replace(PROMPT, reference="")) is None
    assert reference_bits(model, tokenizer, replace(PROMPT, reference="long " * 40)) is None


def row(prompt, bits, greedy=True):
    return {
        "prompt_id": prompt,
        "greedy": greedy,
        "verifiable": False,
        "num_words": 3,
        "rewards": {},
        "reference_bits": bits,
    }


def test_the_gain_is_positive_where_fewer_bits_are_needed():
    before = [row("a", 2.0), row("b", 3.0), row("c", None), row("a", None, greedy=False)]
    after = [row("a", 1.0), row("b", 2.5), row("c", 1.0), row("a", None, greedy=False)]
    assert score(after)["reference_bits_per_byte"].value == pytest.approx(1.5)
    gain = gains(after, before)["reference_bits_per_byte_gain"]
    assert (gain.value, gain.n) == (pytest.approx(0.75), 2)
