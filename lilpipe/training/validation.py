"""Validation during pretraining: bits per byte, needle in a haystack, and text samples.

Dimensions: B rows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lilpipe import distributed
from lilpipe.config.sampling import SamplingConfig
from lilpipe.config.training import NeedleConfig, PretrainConfig
from lilpipe.generation.engine import generate
from lilpipe.model.transformer import Transformer
from lilpipe.stage import Workspace
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.tokens.loader import corpus_validation_shares, validation_rows
from lilpipe.tokens.shards import CORPUS, EXERCISES, TokenShards
from lilpipe.training import needle
from lilpipe.training.replica import Replica, Scorer

SAMPLE_TOKENS = 64
"""Length of a text sample."""
FILLER_TOKENS = 2**20
"""Maximum tokens of validation text that needles are hidden in."""


class Validation:
    """Evaluation for ``train``, at its intervals and at the end of each phase."""

    def __init__(self, config: PretrainConfig, shards: TokenShards, tokenizer: Tokenizer, workspace: Workspace) -> None:
        self._config = config
        self._shards = shards
        self._tokenizer = tokenizer
        self._workspace = workspace
        # Prepare all inputs now, so that an error does not occur in the middle of a run.
        lengths = {phase.seq_len for phase in config.resolved_phases}
        self._rows = {seq_len: self._read_rows(seq_len) for seq_len in lengths}
        self._texts = {seq_len: self._make_texts(config.needle, seq_len) for seq_len in lengths if config.needle}

    def __call__(self, subject: Scorer, done: int) -> Mapping[str, float]:
        """Return bits per byte of every stream at the phase's sequence length; needle metrics at the end of a phase."""
        # Rows of other shapes would be compiled again.
        with torch.compiler.set_stance("force_eager"):
            return self._measure(subject, done)

    def _measure(self, subject: Scorer, done: int) -> Mapping[str, float]:
        phase = self._config.phase_of(done - 1)
        metrics = self.bits_per_byte(subject, seq_len=phase.seq_len)
        if self._texts and done == phase.stop:
            rank, world_size = subject.data_ranks
            found = needle.needle(subject.score, self._texts[phase.seq_len], rank=rank, world_size=world_size)
            metrics |= needle.metrics(found, seq_len=phase.seq_len)
        if isinstance(subject, Replica):  # a sharded model may be too large to sample from on one worker
            assert isinstance(subject.model, Transformer)
            self._sample(subject.model, done)
        return metrics

    def bits_per_byte(self, subject: Scorer, *, seq_len: int) -> dict[str, float]:
        """Return bits per byte of each stream; the rows are divided among the workers.

        For a corpus of several streams, ``validation_bits_per_byte_corpus`` is their mean weighted by
        ``corpus_validation_shares``.
        """
        shares, rows = self._rows[seq_len]
        bits = {
            name: subject.nats(inputs_BT, targets_BT) / math.log(2) / num_bytes
            for name, (inputs_BT, targets_BT, num_bytes) in rows.items()
        }
        if shares:
            bits[CORPUS] = sum(share * bits[name] for name, share in shares.items())
        return {f"validation_bits_per_byte_{name}": value for name, value in bits.items()}

    def _read_rows(self, seq_len: int) -> tuple[dict[str, float], dict[str, tuple[Tensor, Tensor, int]]]:
        shares = corpus_validation_shares(self._shards, seq_len=seq_len)
        names = [*shares, *(name for name in self._shards.streams if name == EXERCISES)]
        num_rows = self._config.validation_rows
        return shares, {name: validation_rows(self._shards, name, num_rows=num_rows, seq_len=seq_len) for name in names}

    def _make_texts(self, config: NeedleConfig, seq_len: int) -> needle.Texts:
        assert self._config.seed is not None
        filler = needle.read_filler(self._shards, num_tokens=FILLER_TOKENS)
        return needle.make_texts(self._tokenizer, filler, seq_len=seq_len, config=config, seed=self._config.seed)

    def _sample(self, model: Transformer, done: int) -> None:
        """Generate text for each of ``sample_prompts``, for people."""
        if not distributed.is_main() or not self._config.sample_prompts:
            return
        assert self._config.seed is not None
        prompts = [self._tokenizer.encode_prompt(prompt) for prompt in self._config.sample_prompts]
        sampling = SamplingConfig(temperature=0.8, max_new_tokens=SAMPLE_TOKENS)
        answers = generate(
            model, prompts, sampling=sampling, stop_ids=[self._tokenizer.document_end_id], seed=self._config.seed
        )
        texts = [
            prompt + self._tokenizer.decode(answer.tokens)
            for prompt, (answer,) in zip(self._config.sample_prompts, answers, strict=True)
        ]
        self._workspace.text(done, "samples", "\n\n---\n\n".join(texts))
