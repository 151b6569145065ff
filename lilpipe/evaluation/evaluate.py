"""Stage ``evaluate``: scores the model after each training stage on the same held-out prompts.

For each model: bits per byte of validation text, accuracy of the greedy completion, mean accuracy of sampled
completions, pass@k, and the mean of each reward; all but bits per byte also by family and difficulty, with number of
prompts and standard error. Sampled completions of each chat model are compared with a reference (``games``). A model is
called better than the previous one only beyond the noise (``comparison``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lilpipe import distributed
from lilpipe.alignment.rewards.reward_functions import Rewards, external
from lilpipe.alignment.rollout.completion_rows import load_rewards
from lilpipe.artifact import Inputs, all_inputs, one_input, optional_input, write_atomically
from lilpipe.config.evaluate import EvaluateConfig
from lilpipe.config.prompts import RewardConfig
from lilpipe.errors import ConfigError
from lilpipe.evaluation.candidates import Candidate, add_rewards, as_candidate, sample_all, validation_bits
from lilpipe.evaluation.comparison import beyond_noise
from lilpipe.evaluation.estimates import Estimates, Evaluation, comparisons, score_all, score_by
from lilpipe.evaluation.evaluation_report import write_page
from lilpipe.evaluation.games import (
    Outcomes,
    by_brevity,
    by_reward,
    ending,
    play,
    play_before_judge,
    reference_answers,
    set_against,
)
from lilpipe.metrics.pass_at_k import Estimate
from lilpipe.schemas.chunks import Row
from lilpipe.schemas.examples import Prompt, read_prompts
from lilpipe.stage import Metrics, Stage, Workspace

REFERENCE_ANSWERS = "reference answers"
"""Name under which the prompts' reference answers take part in games."""


def run(config: EvaluateConfig, inputs: Inputs, workspace: Workspace) -> Metrics:
    """Evaluate every model of input ``models``, in order. Raises ``ConfigError`` for inconsistent inputs."""
    candidates, reference = _candidates(inputs)
    source, tokens = one_input(inputs, "prompts"), optional_input(inputs, "tokens")
    prompts = read_prompts(source.path, config.split)
    opponent = REFERENCE_ANSWERS if config.win_against == "answer" else reference.name if reference else None
    if config.win_by == "judge" and opponent is None:
        raise ConfigError(
            "evaluate.win_by: got 'judge', but nothing to compare with; add an input `reference` to the step, such as "
            "the model before training, or set evaluate.win_against = 'answer'"
        )
    rewards = _rewards(config, inputs)
    rewards.log_sandbox(prompts, workspace)
    entrants = candidates if reference is None or reference in candidates else [*candidates, reference]
    rows = sample_all(entrants, prompts, config, workspace)
    unanswered: Metrics = {}
    if config.win_against == "answer":
        rows[REFERENCE_ANSWERS] = reference_answers(prompts, num_generations=config.num_generations)
        unanswered = _count_without_reference(prompts, workspace)
    rows = add_rewards(rows, prompts, rewards, workspace)
    outcomes = _play(candidates, rows, opponent, config, rewards, workspace)
    bits = validation_bits(candidates, tokens, config, workspace) if tokens is not None else {}
    rows = {candidate.name: rows[candidate.name] for candidate in candidates}
    scores = score_all(rows, outcomes, judged=config.win_by == "judge")
    found = Evaluation(config, prompts, rows, scores, bits, outcomes, opponent)
    if distributed.is_main():
        _write(found, workspace)
    return flat_metrics(scores, bits, num_prompts=len(prompts)) | unanswered


def _count_without_reference(prompts: Sequence[Prompt], workspace: Workspace) -> Metrics:
    count = sum(not prompt.reference for prompt in prompts)
    if count:
        workspace.log(f"{count} of {len(prompts)} prompts have no reference answer and are left out of the win rate")
    return {"prompts_without_reference": count}


def _candidates(inputs: Inputs) -> tuple[list[Candidate], Candidate | None]:
    candidates = [as_candidate(artifact) for artifact in all_inputs(inputs, "models")]
    reference = optional_input(inputs, "reference")
    names = [candidate.name for candidate in candidates]
    if len(set(names)) != len(names):
        raise ConfigError(f"evaluate: the inputs `models` must come from different steps, got {names}")
    if reference is None:
        return candidates, None
    rival = as_candidate(reference)
    for candidate in candidates:
        if candidate.name == rival.name:
            return candidates, candidate
    return candidates, rival


def _rewards(config: EvaluateConfig, inputs: Inputs) -> Rewards:
    """Load the section's rewards, and the reward model's score if a reward model is an input."""
    has_model = "reward_model" in inputs
    if config.win_by == "reward_model" and not has_model:
        raise ConfigError(
            "evaluate.win_by: got 'reward_model', but the step has none; add an input `reward_model` to the step"
        )
    configs = list(config.rewards)
    if has_model and not any(reward.kind == "reward_model" for reward in configs):
        configs.append(RewardConfig(kind="reward_model", weight=0.0))
    return load_rewards(configs, inputs)


def _play(
    candidates: Sequence[Candidate],
    rows: Mapping[str, Sequence[Row]],
    opponent: str | None,
    config: EvaluateConfig,
    rewards: Rewards,
    workspace: Workspace,
) -> dict[str, Outcomes]:
    """Return for each chat model the outcomes of its games against the opponent."""
    if opponent is None or config.win_by == "none":
        return {}
    games = {c.name: set_against(rows[c.name], rows[opponent]) for c in candidates if not c.is_base}
    if config.win_by == "judge":
        return play_before_judge(games, config.judge, workspace)
    if config.win_by == "brevity":
        return play(games, by_brevity)
    name = next(reward.label for reward in rewards.configs if reward.kind == "reward_model")
    return play(games, by_reward(name))


# --- output -------------------------------------------------------------------------------------------------------


def flat_metrics(scores: Mapping[str, Estimates], bits: Mapping[str, float], *, num_prompts: int) -> Metrics:
    """Return ``<metric>/<model>`` and ``<metric>_stderr/<model>``; ``final_accuracy`` is the last model's.

    Comparisons also have ``<metric>_beyond_noise``: 1 if the model is better, -1 if it is worse, 0 if the difference is
    within the noise. A win rate is compared with 0.5.
    """
    metrics: Metrics = {}
    for model, estimates in scores.items():
        for name, estimate in estimates.items():
            metrics[f"{name}/{model}"] = estimate.value
            metrics[f"{name}_stderr/{model}"] = estimate.stderr
            if (difference := _difference(name, estimate)) is not None:
                metrics[f"{name}_beyond_noise/{model}"] = beyond_noise(difference)
    metrics |= {f"bits_per_byte/{model}": value for model, value in bits.items()}
    last = list(scores.values())[-1]
    if "accuracy" in last:
        metrics["final_accuracy"] = last["accuracy"].value
    return {**metrics, "num_prompts": num_prompts}


def _difference(name: str, estimate: Estimate) -> Estimate | None:
    if name == "win_rate":
        return Estimate(estimate.value - 0.5, estimate.stderr, estimate.n)
    return estimate if name.endswith("_gain") else None


def _write(found: Evaluation, workspace: Workspace) -> None:
    document = {
        "split": found.config.split,
        "num_prompts": len(found.prompts),
        "num_generations": found.config.num_generations,
        "reference": found.opponent,
        "comparisons": [comparison.sentence for comparison in comparisons(found)],
        "models": {model: _nested(found, model) for model in found.models},
    }
    write_atomically(workspace.output / "metrics.json", json.dumps(document, indent=2, sort_keys=True) + "\n")
    write_atomically(workspace.output / "samples.jsonl", side_by_side(found.prompts, found.rows, found.outcomes))
    write_atomically(workspace.report / "report.html", write_page(found))


def _nested(found: Evaluation, model: str) -> dict[str, Any]:
    def plain(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
        return {name: vars(estimate) for name, estimate in estimates.items()}

    parts = {
        f"by_{key}": {value: plain(estimates) for value, estimates in score_by(found.rows[model], key).items()}
        for key in ("family", "difficulty")
    }
    return {**plain(found.scores[model]), "bits_per_byte": found.bits.get(model), **parts}


def side_by_side(prompts: Sequence[Prompt], rows: Mapping[str, Sequence[Row]], outcomes: Mapping[str, Outcomes]) -> str:
    """Return JSON lines, one per prompt: each model's greedy completion, first sampled completion, and the outcome of
    its game.
    """
    completions: dict[str, dict[str, dict[str, Any]]] = {prompt.id: {} for prompt in prompts}
    for model, model_rows in rows.items():
        for row in model_rows:
            if row["sample"] == 0:
                kind = "greedy" if row["greedy"] else "sampled"
                verdict = {key: row[key] for key in ("completion", "correct", "rewards")}
                if not row["greedy"] and (played := outcomes.get(model, {}).get(row["prompt_id"])):
                    verdict["game"] = ending(played[0])
                completions[row["prompt_id"]].setdefault(model, {})[kind] = verdict
    lines = [json.dumps({**vars(prompt), "models": completions[prompt.id]}, ensure_ascii=False) for prompt in prompts]
    return "".join(f"{line}\n" for line in lines)


STAGE = Stage(
    name="evaluate",
    output="Report",
    config=EvaluateConfig,
    run=run,
    inputs={"models": "Checkpoint", "prompts": "Prompts"},
    optional_inputs={"reference": "Checkpoint", "tokens": "TokenShards", "reward_model": "Checkpoint"},
    external=external,
    several=frozenset({"models"}),
    names_inputs=True,
    distributed=True,
    main_metric="final_accuracy",
)
