"""Recipes: functions that return a complete configuration."""

from __future__ import annotations

import os
from collections.abc import Callable

from lilpipe.config import (
    CorpusConfig,
    DPOConfig,
    EvaluateConfig,
    GRPOConfig,
    ModelConfig,
    OptimizerConfig,
    PipelineConfig,
    PreferencesConfig,
    PretrainConfig,
    PromptsConfig,
    QualityConfig,
    RejectionSamplingConfig,
    SamplingConfig,
    SFTConfig,
    Source,
    TokenizerConfig,
    TokensConfig,
)
from lilpipe.errors import ConfigError


def tiny() -> PipelineConfig:
    """Every stage at a size that two CPU cores finish in minutes: a 0.4 M parameter model, list tasks, 1024 tokens.

    It shows that each stage works; it does not make a useful model. Two workers train where there are two cores,
    one otherwise, which is another world size and so another fingerprint.
    """
    workers = min(2, len(os.sched_getaffinity(0)))
    sampling = SamplingConfig(max_new_tokens=40)
    return PipelineConfig(
        recipe="tiny",
        corpus=CorpusConfig(
            sources=(Source(kind="installed-docs", name="installed-docs", max_bytes=6_000_000),),
            # Documentation is English with much code in it; the defaults, made for web pages, keep a sixth of it.
            min_language_score=0.5,
            quality=QualityConfig(min_alpha_word_ratio=0.55),
            num_workers=workers,
        ),
        prompts=PromptsConfig(),
        tokenizer=TokenizerConfig(vocab_size=1024),
        tokens=TokensConfig(num_workers=workers),
        pretrain=PretrainConfig(
            model=ModelConfig(
                hidden_size=96, num_layers=3, num_heads=3, num_kv_heads=1, intermediate_size=256, max_seq_len=128
            ),
            optimizer=OptimizerConfig(kind="muon", learning_rate=5e-3, muon_learning_rate=0.02, warmup_steps=100),
            num_steps=2_000,
            batch_size=16,
            num_workers=workers,
            exercise_share=0.6,
        ),
        rejection_sampling=RejectionSamplingConfig(num_workers=workers, sampling=sampling),
        sft=SFTConfig(num_workers=workers),
        preferences=PreferencesConfig(num_workers=workers, sampling=sampling),
        dpo=DPOConfig(num_workers=workers),
        grpo=GRPOConfig(num_workers=workers, sampling=sampling),
        evaluate=EvaluateConfig(num_workers=workers, sampling=sampling),
    )


RECIPES: dict[str, Callable[[], PipelineConfig]] = {"tiny": tiny}
"""Recipe names to the functions that make them."""


def recipe(name: str) -> PipelineConfig:
    """The recipe of that name."""
    if name not in RECIPES:
        raise ConfigError(f"recipe {name!r}: there is no such recipe; known: {', '.join(RECIPES)}")
    return RECIPES[name]()
