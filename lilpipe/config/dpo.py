"""Section of direct preference optimisation and its family."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from lilpipe.config.section import BuiltIn, WithOptions
from lilpipe.config.training import OptimizerConfig, ParallelSection

REFERENCE_FREE = ("orpo", "simpo")


LossKind = Literal["sigmoid", "ipo", "orpo", "simpo", "kto"]


class DPOConfig(ParallelSection, WithOptions):
    """Direct preference optimisation (Rafailov et al. 2023) and its family, with Llama 3's NLL term on chosen
    completions.

    The loss of a pair is `preference_coefficient` times the preference loss plus `rpo_alpha` times the NLL.
    """

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-4, warmup_steps=10, weight_decay=0.0)
    loss_type: Annotated[str, BuiltIn("loss", get_args(LossKind))] = "sigmoid"
    """`sigmoid`: DPO. `ipo`: Azar et al. 2023. `orpo` (Hong et al. 2024) and `simpo` (Meng et al. 2024) do without a
    reference. `kto` (Ethayarajh et al. 2024) takes unpaired completions, desirable or not; a pair gives one of each. Or
    a loss of your own."""
    beta: PositiveFloat = 0.1
    """Strength of the tie to the reference model (Llama 3: 0.1); tau of IPO, scale of SimPO's log-probabilities (2 to
    10 there), lambda of ORPO, by which its odds-ratio loss is weighted."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs thought to be the wrong way round; of `sigmoid` and `simpo`."""
    smoothing: Literal["conservative", "robust"] = "conservative"
    """What `sigmoid` does with it: the expected loss (cDPO; Mitchell 2023), or a loss that is unbiased by wrong pairs
    (rDPO; Chowdhury et al. 2024)."""
    length_normalised: bool | None = None
    """Whether the log-probability of a completion is that of its average token; where none is given `ipo`, `orpo` and
    `simpo` have it so, `sigmoid` and `kto` take sums."""
    gamma: NonNegativeFloat = 0.5
    """Margin by which the chosen completion must win, of `simpo`, in units of its rewards."""
    desirable_weight: PositiveFloat = 1.0
    """Weight of desirable completions, of `kto`."""
    undesirable_weight: PositiveFloat = 1.0
    """Weight of undesirable completions, of `kto`; with n of one for each of the other, weights in the ratio 1:n to
    1:1.33n make up for it (equation 8 there)."""
    kl_examples: PositiveInt = 4
    """Completions of a batch that share an estimate of the KL divergence, of `kto`. They stay together on a worker."""
    rpo_alpha: NonNegativeFloat = 0.2
    """Weight of the negative log-likelihood of chosen completions (Llama 3: 0.2; ORPO: 1)."""
    nll_normalisation: Literal["sequence", "token"] = "sequence"
    """Whether in the NLL each chosen completion weighs the same (Pang et al. 2024) or each of their tokens."""
    preference_coefficient: NonNegativeFloat = 1.0
    """Weight of the preference loss; 0 leaves the NLL-only control."""
    mask_formatting_tokens: bool = True
    """Leave the turn's end and header tokens out of the log-probabilities (Llama 3)."""
    max_chosen_fall: PositiveFloat | None = None
    """Nats by which the log-probability of held-out chosen completions may fall on average before the stage ends with
    an error. Where none is given, a fall by more than 1 is reported."""
    num_epochs: PositiveInt = 1
    batch_size: PositiveInt = 16
    """Pairs of one optimizer step, of `kto` completions; over all workers and accumulation steps."""

    @property
    def uses_reference(self) -> bool:
        """Whether the loss compares with the model that training starts from."""
        return self.loss_type not in REFERENCE_FREE

    @property
    def normalises_length(self) -> bool:
        """``length_normalised``, resolved."""
        return self.loss_type in ("ipo", "orpo", "simpo") if self.length_normalised is None else self.length_normalised

    @model_validator(mode="after")
    def _smoothing_is_used(self) -> DPOConfig:
        if self.label_smoothing and self.loss_type not in ("sigmoid", "simpo"):
            raise ValueError(
                f"label_smoothing {self.label_smoothing} would be ignored by loss {self.loss_type}; set it to 0, or "
                "take loss sigmoid or simpo"
            )
        if self.smoothing == "robust" and (self.loss_type != "sigmoid" or not self.label_smoothing):
            raise ValueError(
                f"smoothing robust would be ignored with loss {self.loss_type} and label_smoothing "
                f"{self.label_smoothing}; take loss sigmoid and label_smoothing above 0"
            )
        return self
