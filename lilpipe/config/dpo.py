"""Section of direct preference optimization (DPO) and its variants."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from lilpipe.config.section import BuiltIn, WithOptions
from lilpipe.config.training import OptimizerConfig, ParallelSection

REFERENCE_FREE = ("orpo", "simpo")


LossKind = Literal["sigmoid", "ipo", "orpo", "simpo", "kto"]


class DPOConfig(ParallelSection, WithOptions):
    """Direct preference optimization (Rafailov et al. 2023) and its variants, with Llama 3's NLL term on chosen
    completions.

    The loss of a pair is `preference_coefficient` times the preference loss plus `rpo_alpha` times the NLL.
    """

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-4, warmup_steps=10, weight_decay=0.0)
    loss_type: Annotated[str, BuiltIn("loss", get_args(LossKind))] = "sigmoid"
    """`sigmoid`: DPO. `ipo`: Azar et al. 2023. `orpo` (Hong et al. 2024) and `simpo` (Meng et al. 2024) need no
    reference model. `kto` (Ethayarajh et al. 2024) uses unpaired completions, desirable or undesirable; a pair gives
    one of each. Or a custom loss."""
    beta: PositiveFloat = 0.1
    """Strength of the regularization towards the reference model (Llama 3: 0.1). IPO: tau. SimPO: scale of the
    log-probabilities (2 to 10 in the paper). ORPO: lambda, the weight of the odds-ratio loss."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Fraction of pairs assumed to have swapped labels (`sigmoid` and `simpo`)."""
    smoothing: Literal["conservative", "robust"] = "conservative"
    """How `sigmoid` uses `label_smoothing`: `conservative` is the expected loss (cDPO; Mitchell 2023), `robust` is
    unbiased under label noise (rDPO; Chowdhury et al. 2024)."""
    length_normalised: bool | None = None
    """Use the mean log-probability per token of a completion instead of the sum. If None: true for `ipo`, `orpo` and
    `simpo`, false for `sigmoid` and `kto`."""
    gamma: NonNegativeFloat = 0.5
    """Target reward margin between chosen and rejected completion, in units of the reward (`simpo`)."""
    desirable_weight: PositiveFloat = 1.0
    """Weight of the loss of desirable completions (`kto`)."""
    undesirable_weight: PositiveFloat = 1.0
    """Weight of the loss of undesirable completions (`kto`). If one kind is n times as frequent as the other, weights
    in the ratio 1:n to 1:1.33n compensate (equation 8 of the paper)."""
    kl_examples: PositiveInt = 4
    """Completions of a batch that share a KL estimate (`kto`). They are kept on the same worker."""
    rpo_alpha: NonNegativeFloat = 0.2
    """Weight of the negative log-likelihood of chosen completions (Llama 3: 0.2; ORPO: 1)."""
    nll_normalisation: Literal["sequence", "token"] = "sequence"
    """Average of the NLL: `sequence` weights each chosen completion equally (Pang et al. 2024), `token` weights each
    token equally."""
    preference_coefficient: NonNegativeFloat = 1.0
    """Weight of the preference loss; 0 trains on the NLL only, as a control."""
    mask_formatting_tokens: bool = True
    """Exclude end-of-turn and header tokens from the log-probabilities (Llama 3)."""
    max_chosen_fall: PositiveFloat | None = None
    """Maximum mean decrease, in nats, of the log-probability of validation chosen completions; a larger decrease fails
    the stage. If None, a decrease of more than 1 is only reported."""
    num_epochs: PositiveInt = 1
    """Number of epochs."""
    batch_size: PositiveInt = 16
    """Pairs per optimizer step (`kto`: completions), over all workers and accumulation steps."""

    @property
    def uses_reference(self) -> bool:
        """Whether the loss needs the reference model, i.e. the model that training starts from."""
        return self.loss_type not in REFERENCE_FREE

    @property
    def normalises_length(self) -> bool:
        """Resolved value of ``length_normalised``."""
        return self.loss_type in ("ipo", "orpo", "simpo") if self.length_normalised is None else self.length_normalised

    @model_validator(mode="after")
    def _smoothing_is_used(self) -> DPOConfig:
        if self.label_smoothing and self.loss_type not in ("sigmoid", "simpo"):
            raise ValueError(
                f"label_smoothing {self.label_smoothing} would be ignored by loss_type {self.loss_type}; set it to "
                "0, or use loss_type sigmoid or simpo"
            )
        if self.smoothing == "robust" and (self.loss_type != "sigmoid" or not self.label_smoothing):
            raise ValueError(
                f"smoothing robust would be ignored with loss_type {self.loss_type} and label_smoothing "
                f"{self.label_smoothing}; use loss_type sigmoid and label_smoothing above 0"
            )
        return self
