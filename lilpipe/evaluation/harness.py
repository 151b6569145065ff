"""Runs EleutherAI's lm-evaluation-harness (Gao et al. 2021) on our models, with its tasks or your own.

Only this module needs ``lm_eval`` (extra ``eval``). The harness's own ``hf`` model also loads an exported checkpoint,
and must give the same results.

Dimensions: B rows, T tokens, N scored tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lilpipe.config.benchmarks import BenchmarksConfig
from lilpipe.config.sampling import SamplingConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.generation.engine import generate
from lilpipe.generation.frozen import load_frozen
from lilpipe.model.transformer import Transformer
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.tokenizer.jinja_template import CHAT_TEMPLATE

MAX_NEW_TOKENS = 256
"""Default maximum length of completions; the same as in the harness's own models."""

Scored = tuple[float, bool]
"""Log-likelihood of a continuation, and whether greedy decoding gives it."""


class HarnessModel(TemplateLM):
    """Adapter of our model to the harness's interface."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, *, batch_size: int = 16, seed: int = 0) -> None:
        super().__init__()
        self.model = model
        self.tokens = tokenizer
        self.batch_size = batch_size
        self.seed = seed
        self.max_length = model.config.max_seq_len

    # --- text and ids ---------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """Id of the token after a text."""
        return self.tokens.document_end_id

    @property
    def prefix_token_id(self) -> int:
        """Id of the token before a text."""
        return (*self.tokens.document_start_ids, self.eot_token_id)[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:  # noqa: ARG002
        """Encode text in which names of special tokens are special tokens, such as a rendered conversation."""
        return self.tokens.encode_marked(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode context and continuation together; apart if a token would cover the end of one and all of the other.

        Such a continuation would have no token of its own, and a log-likelihood of 0, above that of every other.
        """
        before, after = super()._encode_pair(context, continuation)
        return (before, after) if after else (self.tok_encode(context), self.tok_encode(continuation))

    def _decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text without special tokens."""
        special = set(self.tokens.special_ids.values())
        return self.tokens.decode([token for token in ids if token not in special])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation as text. Without ``add_generation_prompt`` the last message stays open."""
        if self.tokens.template is not None:
            text = self.tokens.template.text([*chat_history], add_generation_prompt=add_generation_prompt)  # pyright: ignore
            last = chat_history[-1]["content"].strip()
            return text if add_generation_prompt else text[: text.rindex(last) + len(last)]
        if not self.tokens.has_turns:
            raise DataError("benchmarks.chat: got a vocabulary without tokens for conversations; set chat = false")
        turns = "".join(f"<|{message['role']}|>{message['content']}<|end_of_turn|>" for message in chat_history)
        return turns + "<|assistant|>" if add_generation_prompt else turns.removesuffix("<|end_of_turn|>")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Chat template, for the harness's records."""
        template = self.tokens.template.source if self.tokens.template else CHAT_TEMPLATE
        return template if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        """Tokenizer digest, for the harness's caches."""
        return self.tokens.digest

    # --- log-likelihoods ------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        **kwargs: Any,  # noqa: ARG002
    ) -> list[Scored]:
        """Return scores of continuations; contexts are truncated on the left to fit the model."""
        if too_long := max((len(ids) for _, _, ids in requests if len(ids) > self.max_length), default=0):
            raise DataError(
                f"a continuation of {too_long} tokens: the model takes at most max_seq_len = {self.max_length}; "
                "leave out the task or use a model with a larger max_seq_len"
            )
        rows = [(context + continuation)[-self.max_length - 1 :] for _, context, continuation in requests]
        scores: dict[int, Scored] = {}
        for batch in _batches([len(row) for row in rows], self.batch_size):
            hidden_BTD = self.model.model(self._padded([rows[index][:-1] for index in batch]))
            for hidden_TD, index in zip(hidden_BTD, batch, strict=True):
                continuation_N = torch.tensor(requests[index][2], device=hidden_TD.device)
                end = len(rows[index]) - 1
                logits_NV = self.model.logits(hidden_TD[end - len(continuation_N) : end])
                logprobs_N1 = logits_NV.log_softmax(-1).gather(1, continuation_N[:, None])
                greedy = bool((logits_NV.argmax(-1) == continuation_N).all())
                scores[index] = (float(logprobs_N1.sum()), greedy)
                self._remember("loglikelihood", requests[index][0], scores[index])
        return [scores[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002
        """Return log-likelihoods of whole texts, split into windows of at most ``max_length`` tokens."""
        windows = [
            [(None, *make_disjoint_window(window)) for window in self._windows(request.args[0])] for request in requests
        ]
        scores = iter(self._loglikelihood_tokens([window for parts in windows for window in parts]))
        totals = [sum(next(scores)[0] for _ in parts) for parts in windows]
        for request, total in zip(requests, totals, strict=True):
            self._remember("loglikelihood_rolling", request.args, total)
        return totals

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        """Yield windows as (inputs, targets), such that each token of the text is a target once."""
        ids = self.tok_encode(text)
        return get_rolling_token_windows(
            ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
        )

    def _padded(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return tokens [B, T], padded on the right, where attention does not reach."""
        longest = max(map(len, rows))
        filled = [[*row, *[self.tokens.padding_id] * (longest - len(row))] for row in rows]
        return torch.tensor(filled, device=self.model.device)

    def _remember(self, kind: str, request: Any, result: Any) -> None:
        """Add a result to the harness's cache, if there is one."""
        if request is not None:
            self.cache_hook.add_partial(kind, request, result)

    # --- generation -----------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
        """Generate until a stop string or the end of the document or turn.

        Raises ``ConfigError`` for generation settings that the engine does not support.
        """
        completions: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        arguments: list[tuple[str, dict[str, Any]]] = [cast(Any, request.args) for request in requests]
        for index, (_, settings) in enumerate(arguments):
            groups.setdefault(repr(sorted(settings.items())), []).append(index)
        for indices in groups.values():
            texts = self._complete([arguments[index][0] for index in indices], arguments[indices[0]][1])
            for index, text in zip(indices, texts, strict=True):
                completions[index] = text
                self._remember("generate_until", arguments[index], text)
        return [completions[index] for index in range(len(requests))]

    def _complete(self, contexts: Sequence[str], settings: dict[str, Any]) -> Iterator[str]:
        """Yield a completion of each context, with the same settings."""
        settings = {**normalize_gen_kwargs(settings, MAX_NEW_TOKENS)}
        stops = handle_stop_sequences(settings.pop("until", None), eos=self.tokens.document_end)
        num_tokens = settings.pop("max_gen_toks")
        if not 0 < num_tokens < self.max_length:
            raise ConfigError(
                f"max_gen_toks: got {num_tokens}, expected less than max_seq_len = {self.max_length}; "
                "set it in the task's generation_kwargs"
            )
        sampling = SamplingConfig(
            temperature=settings.pop("temperature", 0.0) if settings.pop("do_sample", False) else 0.0,
            top_p=settings.pop("top_p", 1.0),
            max_new_tokens=num_tokens,
            batch_size=self.batch_size,
        )
        settings.pop("temperature", None)
        if settings:
            raise ConfigError(
                f"generation_kwargs: got {', '.join(settings)}, expected only until, max_gen_toks, do_sample, "
                "temperature and top_p; remove the others"
            )
        room = self.max_length - num_tokens
        prompts = [self.tok_encode(context)[-room:] or [self.prefix_token_id] for context in contexts]
        talks = self.tokens.has_turns or self.tokens.template is not None
        stop_ids = [self.tokens.document_end_id, *([self.tokens.turn_end_id] if talks else [])]
        for [completion] in generate(self.model, prompts, sampling=sampling, stop_ids=stop_ids, seed=self.seed):
            yield postprocess_generated_text(self._decode(completion.tokens), stop=stops, think_end_token=None)


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield batches of row indices, sorted by length, longest first."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def run_harness(checkpoint: Path, config: BenchmarksConfig) -> dict[str, Any]:
    """Run tasks of the harness; return its results, with the samples of each task.

    Raises ``ConfigError`` for an unknown task.
    """
    manager, seed = _task_manager(config.tasks, config.include_path), config.seed or 0
    model, tokenizer = load_frozen(checkpoint)
    results: Any = simple_evaluate(
        model=HarnessModel(model, tokenizer, batch_size=config.batch_size, seed=seed),
        tasks=list(config.tasks),
        task_manager=manager,
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        apply_chat_template=config.chat,
        bootstrap_iters=0,
        log_samples=True,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    return results


def _task_manager(tasks: Sequence[str], include_path: str | None) -> TaskManager:
    """Return a manager of the tasks in ``include_path`` if it has all of them, else also of the harness's (slow)."""
    if include_path and not _unknown(tasks, manager := TaskManager(include_path=include_path, include_defaults=False)):
        return manager
    manager = TaskManager(include_path=include_path)
    if unknown := _unknown(tasks, manager):
        raise ConfigError(
            f"benchmarks.tasks: got {', '.join(unknown)}, expected tasks of the harness or of files in include_path; "
            "`lm-eval ls tasks` lists the harness's tasks"
        )
    return manager


def _unknown(tasks: Sequence[str], manager: TaskManager) -> list[str]:
    return [task for task in tasks if not manager.match_tasks([task])]
