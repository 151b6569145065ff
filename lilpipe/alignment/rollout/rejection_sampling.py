"""Stage ``rejection_sampling``: sample K completions per prompt and keep the good ones.

Llama 3 (Grattafiori et al. 2024, section 4.2.2) selects completions with its reward model; a verifier can decide where
a task has one. ``samples.arrow`` has every sample with its verdict and rewards, ``conversations.arrow`` the distinct
kept completions, ``pass_rates.arrow`` the pass rate of each prompt.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import pyarrow as pa

from lilpipe import distributed, page
from lilpipe.alignment.rewards.reward_functions import Rewards, external
from lilpipe.alignment.rollout.completion_rows import (
    by_prompt,
    load_rewards,
    reward_metrics,
    sample_in_chunks,
    scored_schema,
)
from lilpipe.artifact import Artifact, Inputs, all_inputs, one_input, write_atomically
from lilpipe.config.preferences import RejectionSamplingConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.metrics.pass_at_k import mean_estimate, pass_at_k
from lilpipe.schemas.chunks import Row
from lilpipe.schemas.examples import Conversation, Prompt, check_not_held_out, read_prompts, write_conversations
from lilpipe.schemas.messages import Message
from lilpipe.schemas.tables import write_rows
from lilpipe.stage import Metrics, Stage, Workspace

PASS_RATE_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("family", pa.string()),
        ("num_generations", pa.int32()),
        ("num_correct", pa.int32()),
        ("difficulty", pa.int32()),
        ("pass_rate", pa.float64()),
        ("mean_reward", pa.float64()),
        ("num_kept", pa.int32()),
    ]
)


def select(rows: Sequence[Row], config: RejectionSamplingConfig) -> list[Row]:
    """Return the kept completions of a prompt: ended, non-empty and distinct up to whitespace."""
    if config.keep == "all_correct":
        accepted = [row for row in rows if row["correct"]]
    else:
        least = -math.inf if config.threshold is None else config.threshold
        accepted = [row for row in rows if row["ended"] and row["completion"] and row["reward"] >= least]
        accepted.sort(key=lambda row: -row["reward"])
    kept: dict[str, Row] = {}
    for row in accepted:
        kept.setdefault(" ".join(row["completion"].split()), row)
    return list(kept.values())[: config.max_kept_per_prompt]


def as_conversation(row: Row) -> Conversation:
    """Return the prompt and a kept completion as a conversation."""
    messages: list[Message] = [
        {"role": "user", "content": row["question"]},
        {"role": "assistant", "content": row["completion"]},
    ]
    return Conversation(f"{row['prompt_id']}/{row['sample']}", row["prompt_id"], "rejection_sampling", messages)


def run(config: RejectionSamplingConfig, inputs: Inputs, workspace: Workspace) -> Metrics:
    """Sample, judge and keep completions. Raises ``ConfigError`` if there are fewer than ``num_prompts`` prompts."""
    source = one_input(inputs, "prompts")
    prompts = read_prompts(source.path, "train")
    if config.num_prompts > len(prompts):
        raise ConfigError(
            f"rejection_sampling.num_prompts: got {config.num_prompts}, but the train split has {len(prompts)}; lower "
            "it or raise prompts.num_train"
        )
    prompts = prompts[: config.num_prompts]
    check_not_held_out((prompt.question for prompt in prompts), source.path)
    rewards = load_rewards(config.rewards, inputs)
    rewards.log_sandbox(prompts, workspace)
    model = choose_policy(config, inputs, read_prompts(source.path, "validation"), rewards, workspace)
    rows = sample_in_chunks(
        model,
        prompts,
        config,
        form=config.prompt_form,
        purpose="rejection_sampling",
        rewards=rewards,
        workspace=workspace,
    )
    groups = by_prompt(rows)
    kept = [select(group, config) for group in groups]
    answers = [row for group in kept for row in group]
    metrics = summarise(groups, num_kept=len(answers)) | reward_metrics(groups, rewards)
    if not answers:
        workspace.log(_nothing_kept(config, rows))
    if distributed.is_main():
        rates = [_pass_rate(group, num_kept=len(chosen)) for group, chosen in zip(groups, kept, strict=True)]
        write_rows(workspace.output / "samples.arrow", rows, scored_schema(rewards))
        write_rows(workspace.output / "pass_rates.arrow", rates, PASS_RATE_SCHEMA)
        write_conversations(workspace.output / "conversations.arrow", [as_conversation(row) for row in answers])
        write_atomically(workspace.report / "report.html", _report(groups, answers, metrics))
    return metrics


def _nothing_kept(config: RejectionSamplingConfig, rows: Sequence[Row]) -> str:
    if config.keep == "all_correct":
        return "no sampled completion was correct: the conversations are empty; the model needs more pretraining"
    highest = max((row["reward"] for row in rows if row["ended"]), default=None)
    return (
        "no sampled completion was kept: the conversations are empty; the highest reward of one that ended is "
        f"{highest}, the threshold {config.threshold}"
    )


def choose_policy(
    config: RejectionSamplingConfig,
    inputs: Inputs,
    validation: Sequence[Prompt],
    rewards: Rewards,
    workspace: Workspace,
) -> Artifact:
    """Return the checkpoint to sample from: the last, or the one with the highest mean reward on validation prompts.

    Of several with equal reward the last is chosen. Raises ``DataError`` if 'best' has no validation prompts.
    """
    candidates = all_inputs(inputs, "model")
    if len(candidates) == 1 or config.policy == "latest":
        return candidates[-1]
    if not validation:
        raise DataError(
            "rejection_sampling.policy: 'best' needs prompts of the validation split, got none; use 'latest' or raise "
            "prompts.num_validation"
        )
    estimates = []
    for index, candidate in enumerate(candidates):
        rows = sample_in_chunks(
            candidate,
            validation[: config.policy_prompts],
            config,
            form=config.prompt_form,
            purpose="policy",
            rewards=rewards,
            workspace=workspace,
            name=f"policy-{index}",
        )
        groups = by_prompt(rows)
        estimates.append(mean_estimate([sum(row["reward"] for row in group) / len(group) for group in groups]))
        step, estimate = candidate.manifest.step, estimates[-1]
        workspace.log(f"policy {step}: reward {estimate.value:.4f} +- {estimate.stderr:.4f} on {len(groups)} prompts")
    best = max(range(len(candidates)), key=lambda index: (estimates[index].value, index))
    workspace.log(f"sampling from {candidates[best].manifest.step}")
    return candidates[best]


def summarise(groups: Sequence[Sequence[Row]], *, num_kept: int) -> Metrics:
    """Return pass@1 and pass@K with standard errors over prompts, and statistics of the completions."""
    rows = [row for group in groups for row in group]
    k = len(groups[0])
    first = mean_estimate([pass_at_k(k, _num_correct(group), 1) for group in groups])
    last = mean_estimate([pass_at_k(k, _num_correct(group), k) for group in groups])
    return {
        "pass_at_1": first.value,
        "pass_at_1_stderr": first.stderr,
        f"pass_at_{k}": last.value,
        f"pass_at_{k}_stderr": last.stderr,
        "kept": num_kept,
        "prompts": len(groups),
        "ended_ratio": sum(row["ended"] for row in rows) / len(rows),
        "mean_words": sum(row["num_words"] for row in rows) / len(rows),
    }


def _num_correct(group: Sequence[Row]) -> int:
    return sum(row["correct"] for row in group)


def _pass_rate(group: Sequence[Row], *, num_kept: int) -> Row:
    row = group[0]
    return {
        "prompt_id": row["prompt_id"],
        "family": row["family"],
        "num_generations": len(group),
        "num_correct": _num_correct(group),
        "difficulty": row["difficulty"],
        "pass_rate": _num_correct(group) / len(group),
        "mean_reward": sum(item["reward"] for item in group) / len(group),
        "num_kept": num_kept,
    }


def _report(groups: Sequence[Sequence[Row]], kept: Sequence[Row], metrics: Metrics) -> str:
    sections: dict[str, page.Body] = {"By family": page.table(_table_by("family", groups, kept))}
    if len({group[0]["difficulty"] for group in groups}) > 1:
        sections["By difficulty"] = page.table(_table_by("difficulty", groups, kept))
    k = len(groups[0])
    counts = Counter(_num_correct(group) for group in groups)
    by_correct = {f"{correct} of {k}": counts[correct] for correct in range(k + 1)}
    examples = [
        page.text_block(
            "\n".join(f"[{_verdict(row)}] {row['completion']}" for row in group),
            title=group[0]["question"],
            detail=f"{_num_correct(group)} of {k}",
        )
        for group in groups[:20]
    ]
    figures = {
        "pass@1": metrics["pass_at_1"],
        f"pass@{k}": metrics[f"pass_at_{k}"],
        "reward": metrics["reward"],
        "completions kept": len(kept),
    }
    sections |= {
        "Prompts by correct completions": page.bar_table(by_correct, total=len(groups)),
        "First prompts": examples,
    }
    return page.render("Rejection sampling", sections, key_figures=figures)


def _verdict(row: Row) -> str:
    return f"{'correct' if row['correct'] else 'incorrect'}, reward {row['reward']:.3g}"


def _table_by(column: str, groups: Sequence[Sequence[Row]], kept: Sequence[Row]) -> list[dict[str, page.Cell]]:
    """Return summary statistics by family or difficulty."""
    table: list[dict[str, page.Cell]] = []
    for value in sorted({group[0][column] for group in groups}):
        alike = [group for group in groups if group[0][column] == value]
        summary = summarise(alike, num_kept=sum(row[column] == value for row in kept))
        table.append({column: value, **{key: number for key, number in summary.items() if "stderr" not in key}})
    return table


STAGE = Stage(
    name="rejection_sampling",
    output="Conversations",
    config=RejectionSamplingConfig,
    run=run,
    inputs={"model": "Checkpoint", "prompts": "Prompts"},
    optional_inputs={"reward_model": "Checkpoint"},
    several=frozenset({"model"}),
    external=external,
    distributed=True,
    main_metric="pass_at_1",
)
