"""The vLLM engine against a stand-in, made by hand after vLLM's documented API: its arguments, outputs and workers.

The stand-in holds a transformers' model built from the config that it is started with, takes weights only by the
names that this model has, and draws greedily. vLLM itself has not been run.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from lilpipe.config.sampling import SamplingConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.generation import vllm as module
from lilpipe.generation.engine import generate
from tests.model.checkpoints import SMALL, small_model, small_tokenizer
from tests.model.options import of_family
from tests.model.test_lora import adapted, merged

SAMPLING = SamplingConfig(temperature=0.0, max_new_tokens=10, engine="vllm")
PROMPTS = [[3, 14, 15], [5], [9] * 60]


@dataclass
class SamplingParams:
    """The arguments that are used, by vLLM's names."""

    n: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    max_tokens: int
    stop_token_ids: list[int]
    ignore_eos: bool
    seed: int
    logprobs: int
    detokenize: bool


class LLM:
    started = 0
    forgot = 0

    def __init__(self, *, model, load_format, skip_tokenizer_init, dtype, max_model_len, **rest):
        from transformers import AutoConfig, AutoModelForCausalLM

        assert (load_format, skip_tokenizer_init) == ("dummy", True)
        assert set(rest) <= {"max_num_seqs", "gpu_memory_utilization", "enable_prefix_caching", "logprobs_mode"}
        assert json.loads((Path(model) / "config.json").read_text())["torch_dtype"] == dtype
        self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).eval()
        self.max_model_len = max_model_len
        LLM.started += 1

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        def load_weights(weights):
            weights = dict(weights)
            missing = self.model.load_state_dict(weights, strict=False)
            assert not missing.unexpected_keys
            assert missing.missing_keys in ([], ["lm_head.weight"])

        runner = SimpleNamespace(model=SimpleNamespace(load_weights=load_weights))
        return [method(SimpleNamespace(model_runner=runner), *args, **(kwargs or {}))]

    def reset_prefix_cache(self):
        LLM.forgot += 1
        return True

    @torch.no_grad()
    def generate(self, prompts, sampling_params, *, use_tqdm):
        LLM.asked = sampling_params
        outputs = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            assert len(prompt["prompt_token_ids"]) + params.max_tokens <= self.max_model_len
            completions = [self._complete(prompt["prompt_token_ids"], params, index) for index in range(params.n)]
            outputs.append(SimpleNamespace(outputs=completions))
        return outputs

    def _complete(self, prompt, params, index):
        tokens, logprobs = [], []
        while len(tokens) < params.max_tokens:
            scores = self.model(torch.tensor([prompt + tokens])).logits[0, -1].log_softmax(-1)
            tokens.append(int(scores.argmax()))
            logprobs.append({tokens[-1]: SimpleNamespace(logprob=float(scores.max()), rank=1, decoded_token=None)})
            if tokens[-1] in params.stop_token_ids:
                break
        return SimpleNamespace(index=index, token_ids=tokens, logprobs=logprobs, finish_reason=None, stop_reason=None)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    stand_in = ModuleType("vllm")
    stand_in.__dict__.update(LLM=LLM, SamplingParams=SamplingParams)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    monkeypatch.setattr(module, "_started", {})
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setattr(LLM, "started", 0)
    monkeypatch.setattr(LLM, "forgot", 0)


def answers(model, engine, *, stop_ids=(), tokenizer=None, **changes):
    sampling = SAMPLING.model_copy(update={"engine": engine, **changes})
    groups = generate(
        model, PROMPTS, sampling=sampling, stop_ids=stop_ids, seed=1, num_generations=2, tokenizer=tokenizer
    )
    return [sample for group in groups for sample in group]


def assert_same(got, expected):
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine.tokens, mine.finished, mine.stop_reason) == (theirs.tokens, theirs.finished, theirs.stop_reason)
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {**of_family("gpt2"), "num_kv_heads": 4}], ids=str)
def test_greedy_answers_are_those_of_the_native_engine(changes):
    model = small_model(SMALL.model_copy(update=changes))
    native = answers(model, "native")
    assert_same(answers(model, "vllm"), native)
    stop = native[0].tokens[4]
    stopped = answers(model, "vllm", stop_ids=[stop])
    assert stopped[0].finished
    assert_same(stopped, answers(model, "native", stop_ids=[stop]))


def test_new_weights_are_handed_over_without_a_restart():
    first, second = small_model(seed=0), small_model(seed=1)
    for model in (first, second, first):
        assert_same(answers(model, "vllm"), answers(model, "native"))
    assert LLM.started == 1
    assert LLM.forgot == 3


def test_a_model_with_adapters_is_handed_over_with_them():
    model = adapted()
    assert_same(answers(model, "vllm"), answers(merged(model)[0], "native"))
    assert answers(model, "vllm")[0].tokens != answers(small_model(), "native")[0].tokens


def test_stop_strings_end_an_answer_where_the_native_engine_ends_it():
    model, tokenizer = small_model(), small_tokenizer()
    text = tokenizer.decode(answers(model, "native")[0].tokens)
    stop = (next(text[i : i + 1] for i in range(2, len(text)) if text[i].isascii()),)
    got = answers(model, "vllm", stop=stop, tokenizer=tokenizer)
    assert {"stop_string"} <= {sample.stop_reason for sample in got}
    assert_same(got, answers(model, "native", stop=stop, tokenizer=tokenizer))


def test_settings_reach_vllm_under_its_names_with_a_seed_for_each_prompt():
    answers(small_model(), "vllm", temperature=0.5, top_k=7, top_p=0.8, min_p=0.1, repetition_penalty=1.2)
    first, second, third = LLM.asked
    assert (first.temperature, first.top_k, first.top_p, first.min_p) == (0.5, 7, 0.8, 0.1)
    assert first.repetition_penalty == 1.2
    assert len({first.seed, second.seed, third.seed}) == 3
    assert (first.max_tokens, third.max_tokens) == (10, 4)
    answers(small_model(), "vllm")
    assert LLM.asked[0].top_k == -1


def test_a_model_that_vllm_does_not_know_is_refused():
    with pytest.raises(ConfigError, match="vllm has no architecture"):
        answers(small_model(SMALL.model_copy(update={"logit_softcap": 5.0})), "vllm")


def test_a_prompt_without_room_is_refused_before_vllm_sees_it():
    with pytest.raises(DataError, match="prompt 0: got 64 tokens"):
        generate(small_model(), [[3] * 64], sampling=SAMPLING, stop_ids=(), seed=0)
    assert LLM.started == 0


def test_without_vllm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"install lilpipe\[vllm\]"):
        answers(small_model(), "vllm")
