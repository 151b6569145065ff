"""Stage ``reward_model``: a scalar head trained on preference rankings.

The score of a completion is the head's output at the last token of the conversation, the end-of-turn token. The model
gives sigmoid(score - other score) as the probability that people prefer a completion to the other (Bradley & Terry
1952); the loss is its negative logarithm. Each pair of a ranking (edited > chosen > rejected) counts. Their losses are
averaged per ranking, so that long rankings do not outweigh short ones (Ouyang et al. 2022, InstructGPT, equation 1).

Dimensions: A completions, P pairs, T tokens, O = 1 output.
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
from lilpipe.artifact import Inputs, all_inputs, one_input, write_atomically
from lilpipe.config.reward_model import RewardModelConfig
from lilpipe.errors import DataError
from lilpipe.metrics.pass_at_k import mean_estimate
from lilpipe.model.heads import HeadModel, last_outputs, pad_rows
from lilpipe.model.hub import check_model
from lilpipe.model.scores import IGNORED
from lilpipe.schemas.examples import check_not_held_out
from lilpipe.schemas.messages import Message
from lilpipe.schemas.order import count_steps, rows_by_micro_batch
from lilpipe.schemas.pairs import PAIRS_FILE, Pair, PairSplit, check_pairs, read_pairs
from lilpipe.stage import Metrics, Stage, Workspace
from lilpipe.tokenizer.chat_template import render_completion
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.training import finetune
from lilpipe.training.conversation_encoding import check_tools
from lilpipe.training.finetune import TokenBatch, Workers
from lilpipe.training.finetune_memory import Workload, check_memory, largest_padded_batch
from lilpipe.training.loop import train
from lilpipe.training.replica import Loss, TrainerModule
from lilpipe.training.training_report import write_report

__all__ = ["STAGE", "RewardModel", "bradley_terry_loss", "load_reward_model", "run"]


# --- loss ---------------------------------------------------------------------------------------------------------


def bradley_terry_loss(
    chosen_P: Tensor, rejected_P: Tensor, *, margin_P: Tensor | float = 0.0, centering: float = 0.0
) -> Tensor:
    """Return -log sigmoid(chosen - rejected - margin) + centering * (chosen + rejected)^2 for each pair [P]."""
    loss_P = -F.logsigmoid(chosen_P - rejected_P - margin_P)
    return loss_P + centering * (chosen_P + rejected_P).square() if centering else loss_P


class PairsOfRankings(NamedTuple):
    """All pairs within each ranking; indices refer to the concatenated completions of all rankings."""

    better_P: Tensor
    """Index of the preferred completion."""
    worse_P: Tensor
    apart_P: Tensor
    """Difference of the two ranks, float32: 1 for neighbours."""
    weight_P: Tensor
    """1 / number of pairs of the ranking, float32."""


def pairs_of_rankings(sizes: Sequence[int]) -> PairsOfRankings:
    """Return the pairs of rankings with these numbers of completions, each ordered best first."""
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
    """Token ids of a ranking's conversations, best completion first; each ends with the end-of-turn token."""

    prompt_id: str
    answers: list[list[int]]

    @property
    def num_tokens(self) -> int:
        """Tokens of all conversations, the prompt counted in each."""
        return sum(map(len, self.answers))


def encode_ranking(tokenizer: Tokenizer, pair: Pair) -> EncodedRanking:
    """Tokenize the prompt with each of the completions. Raises ``DataError`` if the chat template rejects them."""
    check_tools(tokenizer, pair.prompt, pair.tools)
    answers = []
    for text in pair.ranking:
        messages = [*pair.prompt, Message(role="assistant", content=text)]
        before, answer = render_completion(tokenizer, messages, tools=pair.tools)
        answers.append([*before, *answer])
    return EncodedRanking(pair.prompt_id, answers)


def gather_pairs(inputs: Inputs) -> dict[PairSplit, list[Pair]]:
    """Return the pairs of the input ``preferences`` or, without it, of ``prompts``, by split.

    Raises ``DataError`` if there are none, or if they contain questions held out by ``prompts``.
    """
    sources = all_inputs(inputs, "preferences") or all_inputs(inputs, "prompts")
    sources = tuple(source for source in sources if (source.path / PAIRS_FILE).exists())
    pairs: dict[PairSplit, list[Pair]] = {"train": [], "validation": []}
    for split, found in pairs.items():
        found += [pair for source in sources for pair in read_pairs(source.path, split)]
    if not pairs["train"]:
        raise DataError(
            "reward_model: got no pairs, expected at least one batch; give the step an input `preferences`, or "
            "`prompts` made from a preference dataset"
        )
    check_pairs(pairs["train"], pairs["validation"])
    for source in all_inputs(inputs, "prompts"):
        check_not_held_out((text for pair in pairs["train"] for text in pair.questions), source.path)
    return pairs


def encode_rankings(
    tokenizer: Tokenizer, pairs: Sequence[Pair], workspace: Workspace, *, split: PairSplit, max_len: int
) -> list[EncodedRanking]:
    """Tokenize rankings; skip and list those with a too long conversation, or that the chat template rejects.

    Completions are never truncated.
    """
    fitting, too_long, rejected = [], [], []
    for pair in pairs:
        try:
            ranking = encode_ranking(tokenizer, pair)
        except DataError as error:
            rejected.append({"prompt_id": pair.prompt_id, "error": str(error)})
            continue
        (too_long if max(map(len, ranking.answers)) > max_len else fitting).append(ranking)
    if too_long and distributed.is_main():
        path = workspace.report / f"too_long_{split}.jsonl"
        rows = [{"prompt_id": item.prompt_id, "tokens": list(map(len, item.answers))} for item in too_long]
        write_atomically(path, "".join(f"{json.dumps(row)}\n" for row in rows))
        workspace.log(
            f"skipped {len(too_long)} of {len(pairs)} rankings with a conversation of more than {max_len} tokens "
            f"(report/{path.name})"
        )
    if rejected and distributed.is_main():
        path = workspace.report / f"rejected_{split}.jsonl"
        write_atomically(path, "".join(f"{json.dumps(row)}\n" for row in rejected))
        workspace.log(f"skipped {len(rejected)} of {len(pairs)} rankings: {rejected[0]['error']} (report/{path.name})")
    return fitting


# --- stage --------------------------------------------------------------------------------------------------------


def run(config: RewardModelConfig, inputs: Inputs, workspace: Workspace) -> Metrics:
    """Train on rankings and evaluate on the validation split.

    Raises ``DataError`` if there are too few pairs or unfit ones, ``ConfigError`` if the parallel layout does not fit
    the model.
    """
    source = one_input(inputs, "model")
    assert config.seed is not None
    pairs = gather_pairs(inputs)
    shape, _, tokenizer = check_model(source.path)
    rankings, validation = (
        encode_rankings(tokenizer, pairs[split], workspace, split=split, max_len=shape.max_seq_len)
        for split in ("train", "validation")
    )
    num_steps = _num_steps(config, len(rankings))
    if not validation:
        workspace.log("no pairs in the validation split: accuracy and calibration are not measured")
    lengths = [tuple(map(len, ranking.answers)) for ranking in rankings]
    largest_batch = largest_padded_batch(lengths, config, num_steps=num_steps)
    check_memory(config, Workload(source.path, largest_batch, head=1), workspace, stage="reward_model")
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
        identity={role: [item.content_digest for item in all_inputs(inputs, role)] for role in sorted(inputs)},
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
    finetune.export(trainer_module, tokenizer, workspace, source=source.path, labels=["reward"])
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
        remedy="collect more preferences",
    )


class _Answers(NamedTuple):
    """Inputs of the loss of a micro-batch other than the scores."""

    lengths_A: Tensor
    """Number of tokens of each conversation."""
    pairs: PairsOfRankings
    num_rankings: int
    num_tokens: int


class RankingObjective:
    """Rankings of one data rank; see ``lilpipe.training.finetune.Objective``."""

    def __init__(
        self, rankings: Sequence[EncodedRanking], config: RewardModelConfig, *, padding_id: int, workers: Workers
    ) -> None:
        self._rankings, self._config, self._padding_id, self._workers = rankings, config, padding_id, workers
        self._lengths = [ranking.num_tokens for ranking in rankings]
        self._max_answers = max(len(ranking.answers) for ranking in rankings)

    def batches(self, step: int) -> list[TokenBatch]:
        """Return the micro-batches of an optimizer step."""
        rank, world_size = self._workers.data_rank, self._workers.num_data_ranks
        parts = rows_by_micro_batch(step, self._lengths, self._config, rank=rank, world_size=world_size)
        return [self._batch(part) for part in parts]

    def _batch(self, rows: Sequence[int]) -> TokenBatch:
        batch = collate([self._rankings[row] for row in rows], padding_id=self._padding_id)
        answers = [row * self._max_answers + n for row in rows for n in range(len(self._rankings[row].answers))]
        sequences_AT = torch.tensor(answers, device=batch.inputs.device)[:, None].expand_as(batch.inputs)
        return batch._replace(sequences=sequences_AT)

    def loss(self, outputs_ATO: Tensor, batch: TokenBatch) -> Loss:
        """Return the loss, averaged over the pairs of each ranking and summed over rankings."""
        return ranking_loss(outputs_ATO, batch, self._config)


def collate(rankings: Sequence[EncodedRanking], *, padding_id: int) -> TokenBatch:
    """Return a batch with a row for each completion of the rankings."""
    device = distributed.device()
    tokens_AT, lengths_A = pad_rows([ids for item in rankings for ids in item.answers], padding_id=padding_id)
    pairs = PairsOfRankings(*(part.to(device) for part in pairs_of_rankings([len(r.answers) for r in rankings])))
    extra = _Answers(lengths_A.to(device), pairs, len(rankings), num_tokens=int(lengths_A.sum()))
    tokens_AT = tokens_AT.to(device)
    return TokenBatch(tokens_AT, torch.full_like(tokens_AT, IGNORED), extra=extra)


def ranking_loss(outputs_ATO: Tensor, batch: TokenBatch, config: RewardModelConfig) -> Loss:
    """Return the loss of rankings from the head's outputs at all tokens."""
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
    """Return, for each ranking, the score differences of its pairs (preferred minus other)."""
    scores = iter(score_rows(model, [ids for ranking in rankings for ids in ranking.answers], tokenizer))
    groups = [[next(scores) for _ in ranking.answers] for ranking in rankings]
    return [[better - worse for better, worse in combinations(group, 2)] for group in groups]


def validation_metrics(margins: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return accuracy with standard error over rankings, mean margin, Brier score and calibration error."""
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
    """Return the accuracy of preferring the longer completion, or the shorter if that is more accurate.

    A reward model that is no better may have learned only length (Singhal et al. 2023, "A long way to go").
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
    optional_inputs={"preferences": "Preferences", "prompts": "Prompts", "adapter": "Checkpoint"},
    several=frozenset({"preferences", "prompts"}),
    distributed=True,
    main_metric="validation_accuracy",
)
