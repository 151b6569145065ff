"""The configuration: one frozen typed tree with a section per stage.

Values come from a recipe (``lilpipe.recipes``), then a TOML file, then dotted overrides; see ``recipes.load``. Unknown
settings are refused. Validation is arithmetic and never touches a file.

A field marked ``Operational`` cannot change a stage's output (a worker count, an interval of logging), so it is
left out of the fingerprint: changing it rebuilds nothing.
"""

from lilpipe.config.corpus import (
    ClassifierConfig,
    Columns,
    CorpusConfig,
    DecontaminationConfig,
    ExactDedupConfig,
    LanguageConfig,
    MinhashConfig,
    PIIConfig,
    QualityConfig,
    RayConfig,
    SlurmConfig,
    Source,
    UrlConfig,
)
from lilpipe.config.dpo import DPOConfig
from lilpipe.config.evaluate import EvaluateConfig, JudgeConfig, RegisterConfig
from lilpipe.config.model import ImportModelConfig, MLAConfig, ModelConfig, MoEConfig
from lilpipe.config.parallel import (
    KubernetesLaunchConfig,
    LaunchConfig,
    Layout,
    ParallelConfig,
    SlurmLaunchConfig,
)
from lilpipe.config.phases import MixtureConfig, Phase, PhaseConfig
from lilpipe.config.pipeline import (
    DEFAULT_STEPS,
    OrchestrationConfig,
    PipelineConfig,
    Step,
    step,
)
from lilpipe.config.preferences import PreferencesConfig, RejectionSamplingConfig
from lilpipe.config.prompts import (
    ANSWER_REWARD,
    PromptColumns,
    PromptsConfig,
    PromptSource,
    RewardConfig,
    RewardConfigs,
)
from lilpipe.config.reinforcement import GRPOConfig, PPOConfig
from lilpipe.config.reward_model import ClassifyConfig, RewardModelConfig
from lilpipe.config.sampling import SamplingConfig, SamplingSection
from lilpipe.config.section import (
    NumWorkers,
    Operational,
    Rounding,
    Section,
    Share,
)
from lilpipe.config.sft import LoRAConfig, SFTConfig
from lilpipe.config.tokens import (
    OtherTokenizer,
    TokenizerConfig,
    TokensConfig,
)
from lilpipe.config.training import (
    BudgetConfig,
    HealthConfig,
    NeedleConfig,
    OptimizerConfig,
    ParallelSection,
    PretrainConfig,
    TrainingSection,
)

__all__ = [
    "ANSWER_REWARD",
    "DEFAULT_STEPS",
    "BudgetConfig",
    "ClassifierConfig",
    "ClassifyConfig",
    "Columns",
    "CorpusConfig",
    "DPOConfig",
    "DecontaminationConfig",
    "EvaluateConfig",
    "ExactDedupConfig",
    "GRPOConfig",
    "HealthConfig",
    "ImportModelConfig",
    "JudgeConfig",
    "KubernetesLaunchConfig",
    "LanguageConfig",
    "LaunchConfig",
    "Layout",
    "LoRAConfig",
    "MLAConfig",
    "MinhashConfig",
    "MixtureConfig",
    "MoEConfig",
    "ModelConfig",
    "NeedleConfig",
    "NumWorkers",
    "Operational",
    "OptimizerConfig",
    "OrchestrationConfig",
    "OtherTokenizer",
    "PIIConfig",
    "PPOConfig",
    "ParallelConfig",
    "ParallelSection",
    "Phase",
    "PhaseConfig",
    "PipelineConfig",
    "PreferencesConfig",
    "PretrainConfig",
    "PromptColumns",
    "PromptSource",
    "PromptsConfig",
    "QualityConfig",
    "RayConfig",
    "RegisterConfig",
    "RejectionSamplingConfig",
    "RewardConfig",
    "RewardConfigs",
    "RewardModelConfig",
    "Rounding",
    "SFTConfig",
    "SamplingConfig",
    "SamplingSection",
    "Section",
    "Share",
    "SlurmConfig",
    "SlurmLaunchConfig",
    "Source",
    "Step",
    "TokenizerConfig",
    "TokensConfig",
    "TrainingSection",
    "UrlConfig",
    "step",
]
