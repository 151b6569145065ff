"""Stage ``dpo``: direct preference optimisation (Rafailov et al. 2023), with Llama 3's two changes.

They are a negative log-likelihood term on the chosen answers (after Pang et al. 2024; each pair weighs the same) and
formatting tokens left out of the log-probabilities that are compared (Grattafiori et al. 2024, section 4.1.4). The
turn's header belongs to the prompt and never counts. The turn's end is left out of the ratios, where it would be
pushed up in one answer and down in the other at once; it stays in the likelihood term, so that the model goes on
ending its answers.

Dimensions: N pairs, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilpipe import distributed
from lilpipe.alignment.chunks import run_chunks
from lilpipe.alignment.completions import pad_completions
from lilpipe.alignment.order import rows_of_step
from lilpipe.alignment.preferences import Pair, read_pairs
from lilpipe.artifact import Artifact, Inputs
from lilpipe.config import DPOConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.model.hub import load_model, save_model
from lilpipe.model.transformer import Transformer, token_logprobs
from lilpipe.stage import Metrics, Stage, Workspace
from lilpipe.tokenizer.chat_template import render
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.training.curves import write_report
from lilpipe.training.loop import Loss, train

CHOSEN_FALL_ALARM = 1.0
"""Nats. A fall of the held-out chosen answers' mean log-probability by more than this is reported: DPO can widen its
margin while both answers become unlikely, and accuracy falls with them."""

TIE_NATS = 1e-4
"""Smaller differences of log-probability are rounding: the reference against itself is a tie."""

PAIRS_AT_ONCE = 32
REFERENCE_SCHEMA = pa.schema([("chosen", pa.float32()), ("rejected", pa.float32())])


# --- mathematics --------------------------------------------------------------------------------------------------


class PairLogprobs(NamedTuple):
    """What a model says about N pairs."""

    chosen_N: Tensor
    """Log-probability of the chosen answer: a sum over its tokens."""
    rejected_N: Tensor
    chosen_mean_N: Tensor
    """Mean log-probability of a token of the chosen answer, its end included."""


def dpo_margin(policy: PairLogprobs, reference_chosen_N: Tensor, reference_rejected_N: Tensor) -> Tensor:
    """How much more the policy than the reference prefers the chosen answer, in nats [N]."""
    return (policy.chosen_N - reference_chosen_N) - (policy.rejected_N - reference_rejected_N)


def dpo_loss(margin_N: Tensor, *, beta: float) -> Tensor:
    """Loss of each pair [N]: -log sigmoid(beta * margin) (Rafailov et al. 2023, equation 7)."""
    return -F.logsigmoid(beta * margin_N)


# --- pairs as tokens ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedPair:
    """Token ids; the answers end with the turn's end."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def encode_pair(tokenizer: Tokenizer, pair: Pair) -> EncodedPair:
    """The prompt with the assistant's header, and both answers."""
    prompt, _ = render(tokenizer, pair.prompt, add_generation_prompt=True)
    end = [tokenizer.turn_end_id]
    return EncodedPair(prompt, tokenizer.encode(pair.chosen) + end, tokenizer.encode(pair.rejected) + end)


def pair_logprobs(
    model: Transformer, pairs: Sequence[EncodedPair], *, padding_id: int, mask_formatting_tokens: bool
) -> tuple[PairLogprobs, int]:
    """Log-probabilities of N pairs in one forward pass, and the number of tokens that went through the model."""
    prompts = [pair.prompt for pair in pairs] * 2
    answers = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    tokens_NT, mask_NT = pad_completions(prompts, answers, padding_id=padding_id)
    tokens_NT, mask_NT = tokens_NT.to(model.device), mask_NT.to(model.device)
    logprobs_NT = token_logprobs(model, tokens_NT) * mask_NT
    mean_N = logprobs_NT.sum(dim=1) / mask_NT.sum(dim=1)
    if mask_formatting_tokens:
        ends = [len(prompt) + len(answer) - 2 for prompt, answer in zip(prompts, answers, strict=True)]
        logprobs_NT = logprobs_NT.scatter(1, torch.tensor(ends, device=model.device)[:, None], 0.0)
    chosen_N, rejected_N = logprobs_NT.sum(dim=1).chunk(2)
    return PairLogprobs(chosen_N, rejected_N, mean_N.chunk(2)[0]), sum(map(len, prompts)) + sum(map(len, answers))


# --- the stage ----------------------------------------------------------------------------------------------------


class _Data:
    """Encoded pairs with the reference's log-probabilities."""

    def __init__(self, tokenizer: Tokenizer, pairs: Sequence[Pair], config: DPOConfig) -> None:
        self.pairs = [encode_pair(tokenizer, pair) for pair in pairs]
        self.padding_id = tokenizer.padding_id
        self.mask_formatting_tokens = config.mask_formatting_tokens
        self.reference_chosen = torch.empty(0)
        self.reference_rejected = torch.empty(0)

    def logprobs(self, model: Transformer, rows: Sequence[int]) -> tuple[PairLogprobs, int]:
        """``pair_logprobs`` of some rows."""
        return pair_logprobs(
            model,
            [self.pairs[row] for row in rows],
            padding_id=self.padding_id,
            mask_formatting_tokens=self.mask_formatting_tokens,
        )

    def add_reference(self, model: Transformer, workspace: Workspace) -> None:
        """Compute the reference's log-probabilities, once: they lie in scratch for a run that continues."""

        def work(index: int) -> list[dict[str, float]]:
            rows = range(index * PAIRS_AT_ONCE, min((index + 1) * PAIRS_AT_ONCE, len(self.pairs)))
            with torch.inference_mode():
                logprobs, _ = self.logprobs(model, rows)
            return [
                {"chosen": chosen, "rejected": rejected}
                for chosen, rejected in zip(logprobs.chosen_N.tolist(), logprobs.rejected_N.tolist(), strict=True)
            ]

        num_chunks = -(-len(self.pairs) // PAIRS_AT_ONCE)
        table = run_chunks(work, num_chunks, name="reference", schema=REFERENCE_SCHEMA, workspace=workspace)
        self.reference_chosen = torch.tensor([row["chosen"] for row in table], device=model.device)
        self.reference_rejected = torch.tensor([row["rejected"] for row in table], device=model.device)

    def margins(self, policy: PairLogprobs, rows: Sequence[int]) -> Tensor:
        """``dpo_margin`` of some rows."""
        index = torch.tensor(rows, device=policy.chosen_N.device)
        return dpo_margin(policy, self.reference_chosen[index], self.reference_rejected[index])


def run(config: DPOConfig, inputs: Inputs, workspace: Workspace) -> Metrics:
    """Train on the pairs. Raises ``DataError`` if there are fewer than one batch of them."""
    source, preferences = inputs["model"], inputs["preferences"]
    assert isinstance(source, Artifact)
    assert isinstance(preferences, Artifact)
    assert config.seed is not None
    model, tokenizer = load_model(source.path)
    model = model.to(distributed.device())
    train_pairs, heldout_pairs = read_pairs(preferences.path, "train"), read_pairs(preferences.path, "heldout")
    num_steps = _num_steps(config, len(train_pairs))
    data = _Data(tokenizer, [*train_pairs, *heldout_pairs], config)
    data.add_reference(model, workspace)
    heldout = range(len(train_pairs), len(data.pairs))
    seed = config.seed

    def loss(model: nn.Module, step: int, micro: int) -> Loss:  # noqa: ARG001 (one micro-batch)
        assert isinstance(model, Transformer)
        rows = rows_of_step(step, num_rows=len(train_pairs), batch_size=config.batch_size, seed=seed)
        return batch_loss(model, data, rows[distributed.rank() :: distributed.world_size()], config)

    def evaluate(model: nn.Module, done: int) -> Mapping[str, float]:
        assert isinstance(model, Transformer)
        metrics = evaluate_pairs(model, data, heldout)
        if metrics.get("heldout_chosen_change", 0.0) < -CHOSEN_FALL_ALARM:
            workspace.log(
                f"step {done}: the log-probability of held-out chosen answers fell by "
                f"{-metrics['heldout_chosen_change']:.2f} nats; raise dpo.nll_coefficient or lower the learning rate"
            )
        return metrics

    with torch.inference_mode():
        before = evaluate_pairs(model, data, heldout)
    result = train(
        model,
        loss=loss,
        num_steps=num_steps,
        workspace=workspace,
        section=config,
        optimizer=config.optimizer,
        evaluate=evaluate,
        eval_every=max(1, num_steps // 4),
        identity={"model": source.content_digest, "preferences": preferences.content_digest},
    )
    metrics = {
        "loss": result.final_loss(),
        "steps": float(num_steps),
        "pairs": float(len(train_pairs)),
        "heldout_pairs": float(len(heldout_pairs)),
        **{f"{name}_before": value for name, value in before.items()},
        **result.metrics,
        "tokens_per_second": result.tokens_per_second,
    }
    if distributed.is_main():
        save_model(model, tokenizer, workspace.output)
        title = "Direct preference optimisation"
        write_report(workspace, title=title, losses=result.losses, config=config, key_figures=metrics)
    return metrics


def _num_steps(config: DPOConfig, num_pairs: int) -> int:
    if config.batch_size % config.num_workers:
        raise ConfigError(
            f"dpo.batch_size: got {config.batch_size}, expected a multiple of num_workers {config.num_workers}"
        )
    if num_pairs < config.batch_size:
        raise DataError(
            f"dpo: got {num_pairs} pairs, expected at least one batch of {config.batch_size}; lower dpo.batch_size or "
            "raise preferences.num_prompts"
        )
    return config.num_epochs * num_pairs // config.batch_size


def batch_loss(model: Transformer, data: _Data, rows: Sequence[int], config: DPOConfig) -> Loss:
    """Preference loss and likelihood term, summed over the pairs of ``rows``."""
    policy, num_tokens = data.logprobs(model, rows)
    margin_N = data.margins(policy, rows)
    loss_N = config.preference_coefficient * dpo_loss(margin_N, beta=config.beta)
    loss_N = loss_N - config.nll_coefficient * policy.chosen_mean_N
    change_N = policy.chosen_N.detach() - data.reference_chosen[torch.tensor(rows, device=model.device)]
    count = float(len(rows))
    return Loss(
        total=loss_N.sum(),
        count=count,
        num_tokens=num_tokens,
        metrics={
            "preference_accuracy": (_share_positive(margin_N) * count, count),
            "margin": (margin_N.detach().sum().item(), count),
            "chosen_change": (change_N.sum().item(), count),
            "chosen_nll": (-policy.chosen_mean_N.detach().sum().item(), count),
        },
    )


def evaluate_pairs(model: Transformer, data: _Data, rows: Sequence[int]) -> dict[str, float]:
    """Metrics on held-out pairs; none where there are no pairs.

    ``preference_accuracy`` is the share of pairs whose margin over the reference is positive (ties count half: the
    reference itself has 0.5); ``likelihood_accuracy`` the share in which the chosen answer is the likelier one.
    """
    if not rows:
        return {}
    parts = [rows[start : start + PAIRS_AT_ONCE] for start in range(0, len(rows), PAIRS_AT_ONCE)]
    policies = [data.logprobs(model, part)[0] for part in parts]
    policy = PairLogprobs(*(torch.cat(tensors) for tensors in zip(*policies, strict=True)))
    margin_N = data.margins(policy, rows)
    change_N = policy.chosen_N - data.reference_chosen[rows[0] : rows[-1] + 1]
    return {
        "heldout_preference_accuracy": _share_positive(margin_N),
        "heldout_likelihood_accuracy": _share_positive(policy.chosen_N - policy.rejected_N),
        "heldout_margin": margin_N.mean().item(),
        "heldout_chosen_change": change_N.mean().item(),
    }


def _share_positive(values_N: Tensor) -> float:
    """Share of positive values; a tie counts half."""
    values_N = values_N.detach()
    wins = (values_N > TIE_NATS).sum() + 0.5 * (values_N.abs() <= TIE_NATS).sum()
    return wins.item() / len(values_N)


STAGE = Stage(
    name="dpo",
    output="Checkpoint",
    config=DPOConfig,
    run=run,
    inputs={"model": "Checkpoint", "preferences": "Preferences"},
    distributed=True,
    main_metric="heldout_preference_accuracy",
)
