"""Stage ``reward_model``: a scalar head that learns which of two answers people prefer.

The score of an answer is the head's output at the last token of the conversation, the end of the assistant's turn.
That a person prefers one answer to another has the probability sigmoid(score - other score) (Bradley & Terry 1952), and
the loss is its negative logarithm. Of a ranking (edited > chosen > rejected) every pair counts, and all of them
together as much as a single pair, so that long rankings do not outweigh short ones (Ouyang et al. 2022, InstructGPT,
equation 1).

Dimensions: A answers, P pairs, T tokens, O = 1 output.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lilpipe import distributed
from lilpipe.alignment.rewards.calibration import calibration, preference_sections
from lilpipe.alignment.rewards.scoring import RewardModel, load_reward_model, score_rows
from lilpipe.artifact import Artifact, Inputs, write_atomically
from lilpipe.config.reward_model import RewardModelConfig
from lilpipe.errors import DataError
from lilpipe.metrics.pass_at_k import mean_estimate
from lilpipe.model.heads import HeadModel, last_outputs, pad_rows
from lilpipe.model.hub import check_model
from lilpipe.model.scores import IGNORED
from lilpipe.schemas.examples import assert_not_held_out
from lilpipe.schemas.messages import Message
from lilpipe.schemas.order import count_steps, rows_by_micro_batch
from lilpipe.schemas.pairs import PAIRS_FILE, Pair, PairSplit, check_pairs, read_pairs
from lilpipe.stage import Metrics, Stage, Workspace
from lilpipe.tokenizer.chat_template import render_completion
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.training import finetune
from lilpipe.training.conversations import artifacts
from lilpipe.training.curves import write_report
from lilpipe.training.finetune import TokenBatch, Workers
from lilpipe.training.loop import train
from lilpipe.training.replica import Loss, TrainerModule

__all__ = ["STAGE", "RewardModel", "bradley_terry_loss", "load_reward_model", "run"]


# --- mathematics --------------------------------------------------------------------------------------------------


def bradley_terry_loss(
    chosen_P: Tensor, rejected_P: Tensor, *, margin_P: Tensor | float = 0.0, centering: float = 0.0
) -> Tensor:
    """Loss of each pair [P]: -log sigmoid(chosen - rejected - margin) + centering * (chosen + rejected)^2."""
    loss_P = -F.logsigmoid(chosen_P - rejected_P - margin_P)
    return loss_P + centering * (chosen_P + rejected_P).square() if centering else loss_P


class PairsOfRankings(NamedTuple):
    """Every pair of answers of the same ranking, all rankings' answers laid out one after the other."""

    better_P: Tensor
    """Index of the answer that is preferred."""
    worse_P: Tensor
    apart_P: Tensor
    """Places between the two, float32: 1 for neighbours."""
    weight_P: Tensor
    """One over the number of pairs of the ranking, float32."""


def pairs_of_rankings(sizes: Sequence[int]) -> PairsOfRankings:
    """The pairs of rankings of so many answers each, the best first."""
    rows: list[tuple[int, int, int, float]] = []
    start = 0
    for size in sizes:
        pairs = list(combinations(range(size), 2))
        rows += [(start + better, start + worse, worse - better, 1 / len(pairs)) for better, worse in pairs]
        start += size
    better, worse, apart, weight = zip(*rows, strict=True)
    return PairsOfRankings(torch.tensor(better), torch.tensor(worse), torch.tensor(apart).float(), torch.tensor(weight))


# --- data ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedRanking:
    """The conversations of a ranking as token ids, the best answer first; each ends with the turn's end."""

    prompt_id: str
    answers: list[list[int]]

    @property
    def num_tokens(self) -> int:
        """Of all answers, the prompt with each."""
        return sum(map(len, self.answers))


def encode_ranking(tokenizer: Tokenizer, pair: Pair) -> EncodedRanking:
    """The prompt with each of the answers."""
    answers = []
    for text in pair.ranking:
        before, answer = render_completion(tokenizer, [*pair.prompt, Message(role="assistant", content=text)])
        answers.append([*before, *answer])
    return EncodedRanking(pair.prompt_id, answers)


def gather_pairs(inputs: Inputs) -> dict[PairSplit, list[Pair]]:
    """The pairs of ``preferences`` or, without such an input, of ``prompts``, by split.

    Raises ``DataError`` for pairs that must not be trained on; ``prompts`` say which questions are held out.
    """
    sources = artifacts(inputs, "preferences") or artifacts(inputs, "prompts")
    sources = tuple(source for source in sources if (source.path / PAIRS_FILE).exists())
    pairs: dict[PairSplit, list[Pair]] = {"train": [], "validation": []}
    for split, found in pairs.items():
        found += [pair for source in sources for pair in read_pairs(source.path, split)]
    if not pairs["train"]:
        raise DataError(
            "reward_model: got no pairs, expected at least one batch; give the step an input `preferences`, or "
            "`prompts` made from a preference set"
        )
    check_pairs(pairs["train"], pairs["validation"])
    for source in artifacts(inputs, "prompts"):
        assert_not_held_out((text for pair in pairs["train"] for text in pair.questions), source.path)
    return pairs


def encode_rankings(
    tokenizer: Tokenizer, pairs: Sequence[Pair], workspace: Workspace, *, split: PairSplit, max_len: int
) -> list[EncodedRanking]:
    """The rankings of which every answer fits; the others are left out and listed, none is ever cut."""
    fitting, too_long = [], []
    for pair in pairs:
        ranking = encode_ranking(tokenizer, pair)
        (too_long if max(map(len, ranking.answers)) > max_len else fitting).append(ranking)
    if too_long and distributed.is_main():
        path = workspace.report / f"too_long_{split}.jsonl"
        rows = [{"prompt_id": item.prompt_id, "tokens": list(map(len, item.answers))} for item in too_long]
        write_atomically(path, "".join(f"{json.dumps(row)}\n" for row in rows))
        workspace.log(
            f"skipped {len(too_long)} of {len(pairs)} rankings with an answer of more than {max_len} tokens "
            f"(report/{path.name})"
        )
    return fitting


# --- the stage ----------------------------------------------------------------------------------------------------


def run(config: RewardModelConfig, inputs: Inputs, workspace: Workspace) -> Metrics:
    """Train on rankings, measure on those held out.

    Raises ``DataError`` for pairs that are too few or not to be trained on, ``ConfigError`` for a layout
    in which the model cannot be cut.
    """
    source = inputs["model"]
    assert isinstance(source, Artifact)
    assert config.seed is not None
    pairs = gather_pairs(inputs)
    shape, _, tokenizer = check_model(source.path)
    rankings, validation = (
        encode_rankings(tokenizer, pairs[split], workspace, split=split, max_len=shape.max_seq_len)
        for split in ("train", "validation")
    )
    num_steps = _num_steps(config, len(rankings))
    if not validation:
        workspace.log("no pairs are held out: accuracy and calibration are not measured")
    workers = finetune.Workers(config)
    objective = RankingObjective(rankings, config, padding_id=tokenizer.padding_id, workers=workers)
    trainer_module = finetune.build(config, source.path, objective, workers, stage="reward_model", head=1)

    def margins() -> list[list[float]]:
        return margins_of_rankings(finetune.whole_head_model(trainer_module), validation, tokenizer)

    def evaluate(trainer_module: TrainerModule, done: int) -> Mapping[str, float]:  # noqa: ARG001
        return validation_metrics(margins())

    result = train(
        trainer_module,
        num_steps=num_steps,
        workspace=workspace,
        section=config,
        optimizer=config.optimizer,
        evaluate=evaluate,
        eval_every=max(1, num_steps // 4),
        identity={role: [item.content_digest for item in artifacts(inputs, role)] for role in sorted(inputs)},
    )
    metrics = {
        "loss": result.final_loss(),
        "steps": float(num_steps),
        "rankings": float(len(rankings)),
        "validation_rankings": float(len(validation)),
        **result.metrics,
        **length_baseline(validation),
        "tokens_per_second": result.tokens_per_second,
    }
    finetune.export(trainer_module, tokenizer, workspace, labels=["reward"])
    found = [margin for group in margins() for margin in group]
    if distributed.is_main():
        write_report(
            workspace,
            title="Reward model",
            losses=result.losses,
            config=config,
            key_figures=metrics,
            sections=preference_sections(found),
        )
    return metrics


def _num_steps(config: RewardModelConfig, num_rankings: int) -> int:
    return count_steps(
        num_rankings,
        num_epochs=config.num_epochs,
        batch_size=config.batch_size,
        stage="reward_model",
        rows="rankings",
        remedy="gather more preferences",
    )


class _Answers(NamedTuple):
    """What the loss of a micro-batch needs beside the scores."""

    lengths_A: Tensor
    """Tokens of each conversation."""
    pairs: PairsOfRankings
    num_rankings: int
    num_tokens: int


class RankingObjective:
    """The rankings of one data rank; see ``lilpipe.training.finetune.Objective``."""

    def __init__(
        self, rankings: Sequence[EncodedRanking], config: RewardModelConfig, *, padding_id: int, workers: Workers
    ) -> None:
        self._rankings, self._config, self._padding_id, self._workers = rankings, config, padding_id, workers
        self._lengths = [ranking.num_tokens for ranking in rankings]

    def batches(self, step: int) -> list[TokenBatch]:
        """The micro-batches of a step."""
        rank, world_size = self._workers.data_rank, self._workers.num_data_ranks
        parts = rows_by_micro_batch(step, self._lengths, self._config, rank=rank, world_size=world_size)
        return [collate([self._rankings[row] for row in part], padding_id=self._padding_id) for part in parts]

    def loss(self, outputs_ATO: Tensor, batch: TokenBatch) -> Loss:
        """Of each ranking the mean over its pairs, summed over rankings."""
        return ranking_loss(outputs_ATO, batch, self._config)


def collate(rankings: Sequence[EncodedRanking], *, padding_id: int) -> TokenBatch:
    """All answers of these rankings, a row each."""
    device = distributed.device()
    tokens_AT, lengths_A = pad_rows([ids for item in rankings for ids in item.answers], padding_id=padding_id)
    pairs = PairsOfRankings(*(part.to(device) for part in pairs_of_rankings([len(r.answers) for r in rankings])))
    extra = _Answers(lengths_A.to(device), pairs, len(rankings), num_tokens=int(lengths_A.sum()))
    tokens_AT = tokens_AT.to(device)
    return TokenBatch(tokens_AT, torch.full_like(tokens_AT, IGNORED), extra=extra)


def ranking_loss(outputs_ATO: Tensor, batch: TokenBatch, config: RewardModelConfig) -> Loss:
    """The loss of rankings by the head's outputs at all tokens of their answers."""
    lengths_A, pairs, num_rankings, num_tokens = batch.extra
    scores_A = last_outputs(outputs_ATO, lengths_A)[:, 0]
    chosen_P, rejected_P = scores_A[pairs.better_P], scores_A[pairs.worse_P]
    loss_P = bradley_terry_loss(
        chosen_P, rejected_P, margin_P=config.margin * pairs.apart_P, centering=config.center_rewards_coefficient
    )
    count = float(num_rankings)
    difference_P = (chosen_P - rejected_P).detach()
    wins_P = (difference_P > 0).float() + 0.5 * (difference_P == 0).float()
    return Loss(
        total=(loss_P * pairs.weight_P).sum(),
        count=count,
        num_tokens=num_tokens,
        metrics={
            "accuracy": ((wins_P * pairs.weight_P).sum(), count),
            "margin": ((difference_P * pairs.weight_P).sum(), count),
            "mean_score": (scores_A.detach().sum(), float(len(scores_A))),
        },
    )


def margins_of_rankings(
    model: HeadModel, rankings: Sequence[EncodedRanking], tokenizer: Tokenizer
) -> list[list[float]]:
    """Of each ranking, by how much the better answer of each pair scores above the worse."""
    scores = iter(score_rows(model, [ids for ranking in rankings for ids in ranking.answers], tokenizer))
    groups = [[next(scores) for _ in ranking.answers] for ranking in rankings]
    return [[better - worse for better, worse in combinations(group, 2)] for group in groups]


def validation_metrics(margins: Sequence[Sequence[float]]) -> dict[str, float]:
    """Accuracy with its standard error over rankings, the mean margin, and how far probabilities can be trusted."""
    if not margins:
        return {}
    shares = [sum((margin > 0) + 0.5 * (margin == 0) for margin in group) / len(group) for group in margins]
    accuracy = mean_estimate(shares)
    pairs = [margin for group in margins for margin in group]
    found = calibration(pairs)
    return {
        "validation_accuracy": accuracy.value,
        "validation_accuracy_stderr": accuracy.stderr,
        "validation_margin": sum(pairs) / len(pairs),
        "validation_brier": found.brier,
        "validation_calibration_error": found.error,
    }


def length_baseline(rankings: Sequence[EncodedRanking]) -> dict[str, float]:
    """The accuracy of going by length alone, always the longer answer or always the shorter, whichever is righter.

    A reward model that is no better may have learnt no more (Singhal et al. 2023, "A long way to go").
    """
    if not rankings:
        return {}
    lengths = [[len(ids) for ids in ranking.answers] for ranking in rankings]
    longer = [
        sum((better > worse) + 0.5 * (better == worse) for better, worse in pairs) / len(pairs)
        for pairs in (list(combinations(group, 2)) for group in lengths)
    ]
    share = sum(longer) / len(longer)
    return {"validation_length_accuracy": max(share, 1 - share)}


STAGE = Stage(
    name="reward_model",
    output="Checkpoint",
    config=RewardModelConfig,
    run=run,
    inputs={"model": "Checkpoint"},
    optional_inputs={"preferences": "Preferences", "prompts": "Prompts"},
    distributed=True,
    main_metric="validation_accuracy",
)
