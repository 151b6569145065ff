"""The configuration: one frozen typed tree with a section per stage.

Values come from a recipe (``lilpipe.recipes``), then a TOML file, then dotted overrides; see ``recipes.load``. Unknown
settings are refused. Validation is arithmetic and never touches a file.

A field marked ``Operational`` cannot change a stage's output (a worker count, an interval of logging), so it is
left out of the fingerprint: changing it rebuilds nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from lilpipe.overrides import set_dotted


class _Operational:
    """Marks a field that cannot change a stage's output."""


Operational = _Operational()

Share = Annotated[float, Field(ge=0, le=1)]
NumWorkers = Annotated[PositiveInt, Operational]


class Section(BaseModel):
    """A frozen part of the configuration that refuses what it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def identity(self) -> dict[str, Any]:
        """The values that can change a stage's output, as plain JSON values, with defaults spelled out."""
        values = {}
        for name, field in type(self).model_fields.items():
            if not any(mark is Operational for mark in field.metadata):
                values[name] = _plain(getattr(self, name))
        return values


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.identity()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


# --- data ---------------------------------------------------------------------------------------------------------


class Source(Section):
    """One origin of raw documents."""

    kind: Literal["installed-docs", "jsonl", "parquet", "text", "huggingface"]
    """`installed-docs`: docstrings, topics and READMEs of this Python environment. `jsonl`, `parquet`, `text`:
    files, plain or compressed (.gz, .zst). `huggingface`: a hub name or a local data set folder."""
    name: str
    """The name that documents of this source carry in reports and shards."""
    path: str | None = None
    """File, folder, glob or fsspec URL (`jsonl`, `parquet`, `text`); hub name or folder (`huggingface`)."""
    text_column: str = "text"
    """Column or JSON key that holds the text."""
    id_column: str = "id"
    """Column or JSON key that holds the document's id; rows without one get `<file>:<row>`."""
    split: str = "train"
    """Split to read (`huggingface` only)."""
    licence: str = "unknown"
    """Licence of the documents, where the documents do not carry their own."""
    max_bytes: PositiveInt | None = None
    """Read at most this many bytes of text from this source, in an order fixed by a hash of the document id."""

    @model_validator(mode="after")
    def _path_matches_kind(self) -> Source:
        if self.kind == "installed-docs" and self.path is not None:
            raise ValueError(f"source {self.name!r}: kind 'installed-docs' reads this environment; remove `path`")
        if self.kind != "installed-docs" and self.path is None:
            raise ValueError(f"source {self.name!r}: kind {self.kind!r} needs `path`")
        return self


class QualityConfig(Section):
    """Heuristic filters on text (datatrove's implementations)."""

    gopher_repetition: bool = True
    """Rae et al. 2021 (Gopher), table A1: shares of repeated lines, paragraphs and n-grams."""
    gopher_quality: bool = True
    """Rae et al. 2021 (Gopher), A1.1: word counts, word lengths, symbols, bullets, stop words."""
    c4: bool = False
    """Raffel et al. 2020 (T5): terminal punctuation, curly brackets, lorem ipsum. Made for web pages; off here."""
    fineweb: bool = True
    """Penedo et al. 2024 (FineWeb): shares of lines ended by punctuation, short lines, duplicated characters."""
    min_words: NonNegativeInt = 30
    """Gopher quality: fewest words in a document."""
    max_words: PositiveInt = 100_000
    """Gopher quality: most words in a document."""
    min_stop_words: NonNegativeInt = 2
    """Gopher quality: fewest distinct stop words in a document."""
    min_alpha_word_ratio: Share = 0.7
    """Gopher quality: least share of words that hold a letter."""
    min_line_punctuation_ratio: Share = 0.05
    """FineWeb: least share of lines that end in punctuation."""
    max_short_line_ratio: Share = 0.9
    """FineWeb: most lines of at most 30 characters, as a share."""
    max_duplicate_line_char_ratio: Share = 0.1
    """FineWeb: most characters in lines that have occurred before, as a share (the paper's 0.1; datatrove: 0.01)."""
    max_line_breaks_per_word: NonNegativeFloat = 0.3
    """FineWeb: most line breaks for each word; lists have more."""


class MinhashConfig(Section):
    """Near-duplicate removal by MinHash-LSH (Broder 1997; FineWeb uses 14 buckets of 8 hashes over 5-grams)."""

    enabled: bool = True
    """Whether to remove near-duplicates at all."""
    num_buckets: PositiveInt = 14
    """LSH bands."""
    hashes_per_bucket: PositiveInt = 8
    """Rows of a band; similarity at even odds is about (1/num_buckets)^(1/hashes_per_bucket)."""
    ngram_size: PositiveInt = 5
    """Words of a shingle."""
    seed: NonNegativeInt = 1
    """Seed of the hash family."""


class CorpusConfig(Section):
    """Raw sources to clean, deduplicated documents."""

    sources: tuple[Source, ...] = (Source(kind="installed-docs", name="installed-docs"),)
    """Where documents come from."""
    min_chars: NonNegativeInt = 200
    """Shorter documents are rejected before any other filter."""
    languages: tuple[str, ...] = ("en",)
    """Languages to keep, as codes of fastText's 176-language model; empty keeps any."""
    min_language_score: Share = 0.65
    """Least confidence of the language, whichever it is (FineWeb: 0.65)."""
    exact_dedup: bool = True
    """Remove documents whose normalised text has been seen before."""
    quality: QualityConfig = QualityConfig()
    """Heuristic quality filters."""
    minhash: MinhashConfig = MinhashConfig()
    """Near-duplicate removal."""
    max_malformed_share: Share = 0.01
    """Unreadable rows are quarantined and counted; above this share of a source's rows, or of its
    files where files break off (truncated, corrupt), the stage fails."""
    num_workers: NumWorkers = 2
    """Processes of datatrove's local executor."""

    @model_validator(mode="after")
    def _sources_are_named_apart(self) -> CorpusConfig:
        names = [source.name for source in self.sources]
        if not names:
            raise ValueError("sources: got none, expected at least one; name a source or leave the default")
        if len(set(names)) != len(names):
            raise ValueError(f"sources: names must differ, got {names}")
        return self


class PromptsConfig(Section):
    """A generated family of tasks whose answers a program can verify, split once for the whole pipeline."""

    seed: int = 0
    """Seed of the generator."""
    families: tuple[str, ...] = ("copy", "reverse", "sort")
    """Task families; `lilpipe.alignment.prompts.FAMILIES` lists them."""
    num_documents: NonNegativeInt = 20_000
    """Exercises in plain text form for pretraining."""
    num_demonstrations: NonNegativeInt = 1_000
    """Prompts with a written answer, for supervised fine-tuning."""
    num_train: PositiveInt = 4_000
    """Prompts without an answer, for sampling: rejection sampling, DPO, GRPO."""
    num_dev: PositiveInt = 300
    """Held-out prompts on which hyperparameters may be chosen."""
    num_test: PositiveInt = 500
    """Held-out prompts that only `evaluate` reads."""
    filler_share: Share = 0.75
    """Share of written answers, in exercises and demonstrations, that open with sentences of courtesy."""
    max_filler_sentences: Annotated[int, Field(ge=0, le=8)] = 3
    """Most sentences of courtesy before an answer."""


class TokenizerConfig(Section):
    """Byte-level BPE."""

    vocab_size: Annotated[int, Field(ge=257 + 8)] = 32_768
    """Size with the 256 bytes and the special tokens."""
    pattern: str = r"[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    """Regular expression that splits text before merging; the default takes digits one by one."""
    max_bytes: PositiveInt | None = None
    """Train on at most this many bytes of the corpus, in its order (which is random)."""
    max_exercise_share: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """The exercises of the `prompts` stage, where it is an input, are at most this share of the training bytes."""


class TokensConfig(Section):
    """Documents to token shards."""

    shard_tokens: PositiveInt = 10_000_000
    """A shard is closed once it holds this many tokens."""
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Share of documents held out for validation, by a hash of the document's text."""
    num_workers: NumWorkers = 2
    """Encoding processes."""


# --- training -----------------------------------------------------------------------------------------------------


class ModelConfig(Section):
    """Llama-style decoder (Touvron et al. 2023; Grattafiori et al. 2024)."""

    hidden_size: PositiveInt = 256
    """Width of the residual stream."""
    num_layers: PositiveInt = 6
    """Decoder blocks."""
    num_heads: PositiveInt = 4
    """Query heads; hidden_size is divided among them."""
    num_kv_heads: PositiveInt = 2
    """Key and value heads (GQA, Ainslie et al. 2023); divides num_heads."""
    intermediate_size: PositiveInt = 704
    """Width of the SwiGLU layer."""
    max_seq_len: PositiveInt = 256
    """Longest sequence."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary embedding (Llama 3: 500,000)."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of RMSNorm."""
    tie_embeddings: bool = True
    """Whether the output layer shares the embedding's weights."""

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")
        if (self.hidden_size // self.num_heads) % 2:
            raise ValueError(
                f"head size hidden_size / num_heads = {self.hidden_size // self.num_heads} must be even for RoPE"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        return self

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


class OptimizerConfig(Section):
    """Optimizer and learning-rate schedule."""

    kind: Literal["adamw", "muon"] = "adamw"
    """`muon`: Muon for the matrices of the blocks (Jordan et al. 2024), AdamW for the rest."""
    learning_rate: PositiveFloat = 3e-3
    """Peak learning rate of AdamW."""
    muon_learning_rate: PositiveFloat = 0.02
    """Peak learning rate of Muon; ignored by `adamw`."""
    beta1: Share = 0.9
    beta2: Share = 0.95
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay, on matrices alone."""
    warmup_steps: NonNegativeInt = 50
    """Steps of linear warmup."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after warmup."""
    min_lr_ratio: Share = 0.0
    """Learning rate at the end as a share of the peak."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this global norm."""


class TrainingSection(Section):
    """What every stage that trains has in common."""

    seed: int | None = None
    """Seed of initialisation, data order and sampling; the pipeline's `seed` where none is given."""
    num_workers: PositiveInt = 1
    """Processes under torchrun. Part of the fingerprint: another world size sums in another order."""
    threads_per_worker: PositiveInt = 1
    """Threads of a process; also able to change the order of summation."""
    checkpoint_every: Annotated[PositiveInt, Operational] = 200
    """Steps between checkpoints."""
    log_every: Annotated[PositiveInt, Operational] = 10
    """Steps between logged points."""


class PretrainConfig(TrainingSection):
    """Next-token training of a fresh model on token shards."""

    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    num_steps: PositiveInt = 1_000
    """Optimizer steps."""
    batch_size: PositiveInt = 16
    """Sequences of one optimizer step, over all workers and accumulation steps."""
    accumulation_steps: PositiveInt = 1
    """Micro-batches of one optimizer step on each worker."""
    exercise_share: Share = 0.5
    """Share of rows from the exercises of the `prompts` stage; the rest comes from the corpus."""
    eval_every: Annotated[PositiveInt, Operational] = 200
    """Steps between validations."""
    eval_rows: PositiveInt = 64
    """Validation rows of each source."""

    @model_validator(mode="after")
    def _batch_divides(self) -> PretrainConfig:
        parts = self.num_workers * self.accumulation_steps
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of num_workers x accumulation_steps = "
                f"{self.num_workers} x {self.accumulation_steps} = {parts}"
            )
        return self


class SamplingConfig(Section):
    """How answers are drawn from a model."""

    temperature: NonNegativeFloat = 1.0
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus (Holtzman et al. 2020)."""
    max_new_tokens: PositiveInt = 48
    """Longest answer."""
    batch_size: PositiveInt = 256
    """Sequences decoded together."""


class SamplingSection(Section):
    """What every stage that samples from a model has in common."""

    seed: int | None = None
    """Seed of sampling; the pipeline's `seed` where none is given."""
    sampling: SamplingConfig = SamplingConfig()
    prompts_per_chunk: PositiveInt = 100
    """Prompts between two points from which a killed run continues."""
    num_workers: NumWorkers = 1
    """Processes that sample; the chunks are divided among them and do not depend on their number."""
    threads_per_worker: PositiveInt = 1
    """Threads of a process."""


class RejectionSamplingConfig(SamplingSection):
    """Sample K answers to each prompt, keep what a verifier accepts."""

    prompt_form: Literal["text", "chat"] = "text"
    """How the model meets a question: `text` as in its pretraining (a base model), `chat` as a user's turn."""
    num_prompts: PositiveInt = 1_000
    """Prompts of the `train` split."""
    samples_per_prompt: PositiveInt = 8
    """K; Llama 3 draws 10 to 30."""
    max_kept_per_prompt: PositiveInt = 1
    """Distinct correct answers kept for one prompt."""


class SFTConfig(TrainingSection):
    """Supervised fine-tuning on conversations; loss on the assistant's tokens alone."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3, warmup_steps=10, weight_decay=0.0)
    num_epochs: PositiveInt = 3
    batch_size: PositiveInt = 16
    """Conversations of one optimizer step."""
    max_demonstrations: NonNegativeInt | None = None
    """Use at most this many written demonstrations of the `prompts` stage; all where none is given."""


class PreferencesConfig(SamplingSection):
    """Pairs of answers sampled from a model: one preferred to the other by a stated rule."""

    rule: Literal["brevity"] = "brevity"
    """`brevity`: of two answers with the same verdict of the verifier, the one with fewer words."""
    num_prompts: PositiveInt = 600
    """Prompts of the `train` split, taken from its end, so that rejection sampling's come last."""
    num_heldout: PositiveInt = 100
    """Prompts of the `dev` split whose pairs are held out, to measure preference accuracy."""
    samples_per_prompt: Annotated[int, Field(ge=2)] = 8
    max_pairs_per_prompt: PositiveInt = 1
    contrast: Literal["widest", "nearest"] = "widest"
    """`widest`: the shortest answer against the longest. `nearest`: an answer as the model drew it against the nearest
    longer one, so that chosen answers are hardly shorter than the model's own and likelihood on them teaches less."""
    min_words_apart: PositiveInt = 1
    """Fewest words by which the answers of a pair differ."""
    only_correct: bool = True
    """Pair correct answers alone; else, after them, also answers that are wrong or malformed alike."""


class DPOConfig(TrainingSection):
    """Direct preference optimisation (Rafailov et al. 2023) with Llama 3's NLL term on chosen answers."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-4, warmup_steps=10, weight_decay=0.0)
    beta: PositiveFloat = 0.1
    """Strength of the tie to the reference model (Llama 3: 0.1)."""
    nll_coefficient: NonNegativeFloat = 0.2
    """Weight of the negative log-likelihood of chosen answers (Llama 3: 0.2)."""
    preference_coefficient: NonNegativeFloat = 1.0
    """Weight of the preference loss; 0 leaves the NLL-only control."""
    mask_formatting_tokens: bool = True
    """Leave the turn's end and header tokens out of the log-probabilities (Llama 3)."""
    num_epochs: PositiveInt = 1
    batch_size: PositiveInt = 16
    """Pairs of one optimizer step."""


class GRPOConfig(TrainingSection):
    """Group relative policy optimisation (Shao et al. 2024) with the verifier as reward."""

    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=3e-4, warmup_steps=3, weight_decay=0.0, schedule="linear"
    )
    num_steps: PositiveInt = 150
    prompts_per_step: PositiveInt = 16
    group_size: Annotated[int, Field(ge=2)] = 8
    """Answers sampled for each prompt."""
    clip_range: PositiveFloat = 0.2
    """Clipping of the probability ratio (PPO's epsilon)."""
    kl_coefficient: NonNegativeFloat = 0.0
    """Weight of the KL divergence to the initial policy (k3 estimator, Schulman 2020)."""
    normalize_std: bool = True
    """Divide advantages by the group's standard deviation; off is Dr.GRPO (Liu et al. 2025)."""
    sampling: SamplingConfig = SamplingConfig()


class EvaluateConfig(SamplingSection):
    """How good the model is after each training stage."""

    split: Literal["test", "dev"] = "test"
    """Prompts to report on; choose hyperparameters on `dev`."""
    samples_per_prompt: PositiveInt = 8
    """Samples behind pass@k."""
    validation_rows: PositiveInt = 200
    """Rows of validation text behind bits per byte."""


class RegisterConfig(Section):
    """The final model in Hugging Face layout, and its name in the MLflow registry."""

    model_name: Annotated[str, Operational] = "lilpipe"
    """Registered model's name."""
    alias: Annotated[str, Operational] = "champion"
    """Alias given to the new version."""


# --- the whole ----------------------------------------------------------------------------------------------------


class Step(Section):
    """One node of the pipeline: a stage, what it reads, and what differs from the stage's section."""

    stage: str
    """Stage to run; `lilpipe.stage.STAGES` lists them."""
    inputs: dict[str, str | tuple[str, ...]] = {}
    """Input role of the stage to the step (or steps) whose artifact fills it."""
    settings: dict[str, Any] = {}
    """Dotted settings of the stage's section that differ for this step alone."""


def step(stage: str, /, settings: dict[str, Any] | None = None, **inputs: str | tuple[str, ...]) -> Step:
    """A ``Step`` with its inputs as keyword arguments."""
    return Step(stage=stage, inputs=inputs, settings=settings or {})


DEFAULT_STEPS = {
    "corpus": step("corpus"),
    "prompts": step("prompts"),
    "tokenizer": step("tokenizer", corpus="corpus", prompts="prompts"),
    "tokens": step("tokens", corpus="corpus", prompts="prompts", tokenizer="tokenizer"),
    "pretrain": step("pretrain", tokens="tokens"),
    "rejection_sampling": step("rejection_sampling", model="pretrain", prompts="prompts"),
    "sft": step("sft", model="pretrain", conversations="rejection_sampling", prompts="prompts"),
    "preferences": step("preferences", model="sft", prompts="prompts"),
    "dpo": step("dpo", model="sft", preferences="preferences"),
    "grpo": step("grpo", model="dpo", prompts="prompts"),
    "evaluate": step(
        "evaluate", models=("pretrain", "sft", "dpo", "grpo"), reference="sft", prompts="prompts", tokens="tokens"
    ),
    "register": step("register", model="grpo", report="evaluate"),
}


class OrchestrationConfig(Section):
    """How stages are run; nothing here can change an output."""

    retries: NonNegativeInt = 2
    """Further tries of a stage after a failure of infrastructure; bad config or data is never retried."""
    retry_delay_seconds: NonNegativeFloat = 5
    timeout_seconds: PositiveFloat = 7 * 24 * 3600
    """Longest time for one try of a stage."""
    stage_timeout_seconds: dict[str, PositiveFloat] = {}
    """Another timeout for single steps."""


class PipelineConfig(Section):
    """The whole pipeline."""

    recipe: str
    """Recipe from which this configuration started."""
    seed: int = 0
    """Seed of every training stage that names none of its own."""
    steps: dict[str, Step] = DEFAULT_STEPS
    """The order and wiring of the stages."""
    corpus: CorpusConfig = CorpusConfig()
    prompts: PromptsConfig = PromptsConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    tokens: TokensConfig = TokensConfig()
    pretrain: PretrainConfig = PretrainConfig()
    rejection_sampling: RejectionSamplingConfig = RejectionSamplingConfig()
    sft: SFTConfig = SFTConfig()
    preferences: PreferencesConfig = PreferencesConfig()
    dpo: DPOConfig = DPOConfig()
    grpo: GRPOConfig = GRPOConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    register_: RegisterConfig = Field(default=RegisterConfig(), alias="register")
    orchestration: OrchestrationConfig = OrchestrationConfig()

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    @model_validator(mode="after")
    def _steps_are_in_order(self) -> PipelineConfig:
        sections = set(type(self).model_fields) | {"register"}
        known: list[str] = []
        for name, node in self.steps.items():
            if node.stage not in sections - {"recipe", "seed", "steps", "orchestration", "register_"}:
                raise ValueError(f"steps.{name}.stage: there is no stage {node.stage!r}")
            for role, upstream in node.inputs.items():
                for source in (upstream,) if isinstance(upstream, str) else upstream:
                    if source not in known:
                        raise ValueError(
                            f"steps.{name}.inputs.{role}: got {source!r}, expected one of the steps before it: "
                            f"{', '.join(known) or 'none'}"
                        )
            self.section(name)
            known.append(name)
        for name in self.orchestration.stage_timeout_seconds:
            if name not in known:
                raise ValueError(f"orchestration.stage_timeout_seconds: there is no step {name!r}")
        return self

    def section(self, step_name: str) -> Any:
        """The complete section of one step: the stage's section, the step's settings, and the seed filled in."""
        node = self.steps[step_name]
        section = getattr(self, "register_" if node.stage == "register" else node.stage)
        values = section.model_dump()
        for key, value in node.settings.items():
            set_dotted(values, key, value, where=f"steps.{step_name}.settings")
        if "seed" in values and values["seed"] is None:
            values["seed"] = self.seed
        return type(section).model_validate(values)
