"""The complete configuration: steps, their inputs, and a section for each stage."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    create_model,
    model_validator,
)

from lilpipe.config.benchmarks import BenchmarksConfig
from lilpipe.config.corpus import CorpusConfig
from lilpipe.config.dpo import DPOConfig
from lilpipe.config.evaluate import EvaluateConfig, RegisterConfig
from lilpipe.config.model import ImportModelConfig
from lilpipe.config.overrides import explain, set_dotted
from lilpipe.config.parallel_checks import check_vocabulary
from lilpipe.config.preferences import PreferencesConfig, RejectionSamplingConfig
from lilpipe.config.prompts import PromptsConfig
from lilpipe.config.reinforcement import GRPOConfig, PPOConfig
from lilpipe.config.release import ReleaseConfig
from lilpipe.config.reward_model import ClassifyConfig, RewardModelConfig
from lilpipe.config.section import CodeFile, Section
from lilpipe.config.sft import SFTConfig
from lilpipe.config.tokens import TokenizerConfig, TokensConfig
from lilpipe.config.training import PretrainConfig
from lilpipe.errors import ConfigError


class Step(Section):
    """One step of the pipeline: a stage, its inputs, and settings that override the stage's section."""

    stage: str
    """Stage to run: one of `lilpipe.stage.STAGES`, or a custom stage."""
    file: CodeFile = None
    """Python file that defines the custom stage; relative to the configuration file's folder."""
    inputs: dict[str, str | tuple[str, ...]] = {}
    """Maps each input role of the stage to the step (or steps) whose artifact it reads."""
    settings: dict[str, Any] = {}
    """Dotted settings that override the stage's section for this step only."""
    enabled: bool = True
    """Whether the step is part of the pipeline; `enable` overrides it. A step that reads the model of a disabled step
    reads that step's own input model instead."""


def step(stage: str, /, settings: dict[str, Any] | None = None, **inputs: str | tuple[str, ...]) -> Step:
    """Return a ``Step`` with its inputs as keyword arguments."""
    return Step(stage=stage, inputs=inputs, settings=settings or {})


MODEL_ROLES = ("model", "models", "reference")
"""Input roles that take the model of a training step."""


def enabled_steps(steps: Mapping[str, Step], enable: Mapping[str, bool]) -> dict[str, Step]:
    """Return the enabled steps. Raises ``ConfigError`` for an unknown step in ``enable``.

    An input model from a disabled step is replaced by that step's own input model; other inputs from it are removed.
    """
    if unknown := enable.keys() - steps.keys():
        raise ConfigError(f"enable.{min(unknown)}: there is no such step; known: {', '.join(steps)}")
    passed_on: dict[str, str | None] = {}
    kept = {}
    for name, node in steps.items():
        inputs: dict[str, str | tuple[str, ...]] = {}
        for role, value in node.inputs.items():
            several = (value,) if isinstance(value, str) else value
            found = [passed_on.get(source, source) for source in several]
            if role not in MODEL_ROLES:
                found = [source for source in several if source not in passed_on]
            names = tuple(dict.fromkeys(source for source in found if source is not None))
            if names:
                inputs[role] = names[0] if isinstance(value, str) else names
        if enable.get(name, node.enabled):
            kept[name] = node.model_copy(update={"inputs": inputs, "enabled": True})
        else:
            model = inputs.get("model")
            passed_on[name] = model if isinstance(model, str) else None
    return kept


DEFAULT_STEPS = {
    "prompts": step("prompts"),
    "corpus": step("corpus", prompts="prompts"),
    "tokenizer": step("tokenizer", corpus="corpus", prompts="prompts"),
    "tokens": step("tokens", corpus="corpus", prompts="prompts", tokenizer="tokenizer"),
    "pretrain": step("pretrain", tokens="tokens"),
    "rejection_sampling": step("rejection_sampling", model="pretrain", prompts="prompts"),
    "sft": step("sft", model="pretrain", conversations="rejection_sampling", prompts="prompts"),
    "preferences": step("preferences", model="sft", prompts="prompts"),
    "dpo": step("dpo", model="sft", preferences="preferences", prompts="prompts"),
    "grpo": step("grpo", model="dpo", prompts="prompts"),
    "evaluate": step(
        "evaluate", models=("pretrain", "sft", "dpo", "grpo"), reference="sft", prompts="prompts", tokens="tokens"
    ),
    "register": step("register", model="grpo", report="evaluate"),
}


class OrchestrationConfig(Section):
    """How stages are run; this cannot change an output."""

    retries: NonNegativeInt = 2
    """Maximum number of retries of a stage after an infrastructure failure; errors in config or data are never
    retried."""
    retry_delay_seconds: NonNegativeFloat = 5
    """Delay before a retry."""
    timeout_seconds: PositiveFloat = 7 * 24 * 3600
    """Timeout of one attempt of a stage."""
    stage_timeout_seconds: dict[str, PositiveFloat] = {}
    """Timeout of single steps; overrides `timeout_seconds`."""


_NO_STAGES = {"recipe", "file", "seed", "depth", "params", "steps", "enable", "orchestration", "register_"}
"""Fields of ``PipelineConfig`` that are not sections of stages."""


class PipelineConfig(Section):
    """Configuration of the whole pipeline."""

    recipe: str
    """Recipe that this configuration started from."""
    file: CodeFile = None
    """Python file that defines the custom recipe; relative to the configuration file's folder."""
    seed: int = 0
    """Seed of all training stages that do not set their own."""
    depth: PositiveInt | None = None
    """Number of layers from which unset values of the model shape, batch size, learning rate and steps of pretraining
    are derived: see `lilpipe.scaling.depth`. Stored to show the origin of these values."""
    params: PositiveInt | str | None = None
    """Like `depth`, but as a number of parameters, such as "350M": selects the nearest depth."""
    steps: dict[str, Step] = DEFAULT_STEPS
    """Steps of the pipeline, in order, with their inputs."""
    enable: dict[str, bool] = {}
    """Turns steps of the recipe on or off, by name."""
    corpus: CorpusConfig = CorpusConfig()
    prompts: PromptsConfig = PromptsConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    tokens: TokensConfig = TokensConfig()
    pretrain: PretrainConfig = PretrainConfig()
    import_model: ImportModelConfig = ImportModelConfig()
    rejection_sampling: RejectionSamplingConfig = RejectionSamplingConfig()
    sft: SFTConfig = SFTConfig()
    preferences: PreferencesConfig = PreferencesConfig()
    dpo: DPOConfig = DPOConfig()
    grpo: GRPOConfig = GRPOConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    ppo: PPOConfig = PPOConfig()
    classify: ClassifyConfig = ClassifyConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    benchmarks: BenchmarksConfig = BenchmarksConfig()
    register_: RegisterConfig = Field(default=RegisterConfig(), alias="register")
    release: ReleaseConfig = ReleaseConfig()
    orchestration: OrchestrationConfig = OrchestrationConfig()

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    @functools.cached_property
    def given(self) -> frozenset[str]:
        """Dotted names of the settings that the user set; others may follow from the base model.

        This is the origin of values, so it is no field: equal values make equal configurations.
        """
        return frozenset()

    def with_given(self, names: frozenset[str]) -> PipelineConfig:
        """Return the configuration with the names of the settings that the user set."""
        copy = self.model_copy()
        vars(copy)["given"] = names
        return copy

    @classmethod
    def with_sections(cls, **sections: type[Section]) -> type[PipelineConfig]:
        """Return a subclass with the sections of custom stages, as keyword arguments named like the stages.

        Raises ``ConfigError`` if a name is not allowed or a section has a setting without a default.
        """
        return _with_sections(cls, tuple(sections.items())) if sections else cls

    @model_validator(mode="after")
    def _steps_are_in_order(self) -> PipelineConfig:
        sections = set(type(self).model_fields) | {"register"}
        known: list[str] = []
        files: dict[str, str | None] = {}
        for name, node in self.steps.items():
            if node.stage not in sections - _NO_STAGES:
                raise ValueError(
                    f"steps.{name}.stage: unknown stage {node.stage!r}; correct the name, or set `file` to the Python "
                    "file that defines it"
                )
            if files.setdefault(node.stage, node.file) != node.file:
                raise ValueError(
                    f"steps.{name}.file: got {node.file} for stage {node.stage!r}, which is defined by "
                    f"{files[node.stage]} in an earlier step; expected the same file in both steps"
                )
            for role, upstream in node.inputs.items():
                for source in (upstream,) if isinstance(upstream, str) else upstream:
                    if source not in known:
                        raise ValueError(
                            f"steps.{name}.inputs.{role}: got {source!r}, expected one of the steps before it: "
                            f"{', '.join(known) or 'none'}"
                        )
            section = self.section(name)
            if isinstance(section, PretrainConfig):
                check_vocabulary(section.layout, self.tokenizer.vocab_size)
            known.append(name)
        for name in self.orchestration.stage_timeout_seconds:
            if name not in known:
                raise ValueError(f"orchestration.stage_timeout_seconds: unknown step {name!r}")
        return self

    def section(self, step_name: str) -> Any:
        """Return the complete section of one step: the stage's section with the step's settings.

        Unset values are filled in from the pipeline's seed and the weights of the corpus's sources.
        """
        node = self.steps[step_name]
        section = getattr(self, "register_" if node.stage == "register" else node.stage)
        values = section.model_dump()
        for key, value in node.settings.items():
            set_dotted(values, key, value, model=type(section), where=f"steps.{step_name}.settings")
        if "seed" in values and values["seed"] is None:
            values["seed"] = self.seed
        if weights := {source.name: source.weight for source in self.corpus.sources if source.weight is not None}:
            self._fill_weights(node.stage, values, weights)
        return type(section).model_validate(values)

    def _fill_weights(self, stage: str, values: dict[str, Any], weights: dict[str, float]) -> None:
        """Apply the weights of sources to the tokenizer's sample and to the mixture, with one stream per source."""
        by_source = self.tokens.streams_by in ("none", "source")
        if stage == "tokenizer" and values["weights_by"] == "source":
            values["weights"] = values["weights"] or weights
        elif stage == "tokens" and by_source:
            values["streams_by"] = "source"
        elif stage == "pretrain" and by_source:
            values["mixture"]["weights"] = values["mixture"]["weights"] or weights


@functools.cache
def _with_sections(base: type[PipelineConfig], sections: tuple[tuple[str, type[Section]], ...]) -> type[PipelineConfig]:
    fields: dict[str, Any] = {}
    for name, section in sections:
        if name in _NO_STAGES or not name.isidentifier() or name.startswith("_") or hasattr(base, name):
            raise ConfigError(
                f"stage {name!r}: expected letters, digits and _, and not the name of another setting; rename it"
            )
        try:
            fields[name] = (section, section())
        except ValidationError as error:
            raise ConfigError(
                f"stage {name!r}: its section {section.__name__} has settings without a default ({explain(error)}); "
                "give each setting a default and check its value in the stage"
            ) from error
    return create_model(base.__name__, __base__=base, __module__=base.__module__, **fields)
