"""Stage ``preferences``: pairs of answers, one preferred to the other by a stated rule.

Answers are sampled from the model that DPO will start from, so that pairs show what it does. ``brevity`` pairs two
answers to one prompt that a verifier judges alike, and prefers the one with fewer words: what differs is style, which
likelihood on correct answers does not teach. ``reward`` pairs the best answer with the worst, by whatever rewards the
section names, and ``correctness`` a right one with a wrong one. ``data`` takes pairs that people made. ``unpaired``
judges each answer by itself instead (``examples.arrow``), as KTO learns from it (Ethayarajh et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lilpipe import distributed, report
from lilpipe.alignment.rewards.reward_functions import external
from lilpipe.alignment.rollout.sampling import by_prompt, load_rewards, reward_metrics, sample_in_chunks, scored_schema
from lilpipe.artifact import Artifact, Inputs, write_atomically
from lilpipe.config.preferences import PreferencesConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.schemas.chunks import Row
from lilpipe.schemas.examples import Prompt, assert_not_held_out, read_prompts
from lilpipe.schemas.messages import Message
from lilpipe.schemas.pairs import (
    EXAMPLE_SCHEMA,
    EXAMPLES_FILE,
    PAIR_SCHEMA,
    PAIRS_FILE,
    Pair,
    PairSplit,
    UnpairedExample,
    check_examples,
    check_pairs,
    read_examples,
    read_pairs,
)
from lilpipe.schemas.tables import write_rows
from lilpipe.stage import Metrics, Stage, Workspace

__all__ = ["PAIR_SCHEMA", "STAGE", "Pair", "brevity_pairs", "read_pairs", "run"]

VERDICTS = ((True, True), (True, False), (False, False))
"""(well-formed, correct), the best first."""


def brevity_pairs(rows: Sequence[Row], config: PreferencesConfig) -> list[tuple[Row, Row]]:
    """(chosen, rejected) among the answers to one prompt, at most ``max_pairs_per_prompt``.

    Both ended, have the same verdict, and differ by ``min_words_apart``; no answer is used twice. Correct answers
    are paired first, then, unless ``only_correct``, wrong ones of the right form, then malformed ones.
    """
    pairs: list[tuple[Row, Row]] = []
    take = _widest if config.contrast == "widest" else _nearest
    for verdict in VERDICTS[:1] if config.only_correct else VERDICTS:
        alike = {
            row["completion"]: row
            for row in reversed(rows)
            if row["ended"] and (row["well_formed"], row["correct"]) == verdict
        }
        left = sorted(alike.values(), key=lambda row: row["sample"])
        while (pair := take(left, config.min_words_apart)) is not None:
            left = [row for row in left if row not in pair]
            pairs.append(pair)
    return pairs[: config.max_pairs_per_prompt]


def _widest(rows: Sequence[Row], min_words_apart: int) -> tuple[Row, Row] | None:
    """The shortest answer and the longest."""
    ranked = sorted(rows, key=lambda row: (row["num_words"], row["sample"]))
    apart = ranked[-1]["num_words"] - ranked[0]["num_words"] if ranked else 0
    return (ranked[0], ranked[-1]) if apart >= min_words_apart else None


def _nearest(rows: Sequence[Row], min_words_apart: int) -> tuple[Row, Row] | None:
    """The first answer sampled that has a longer one far enough away, and the nearest such."""
    for row in rows:
        longer = [other for other in rows if other["num_words"] - row["num_words"] >= min_words_apart]
        if longer:
            return row, min(longer, key=lambda other: (other["num_words"], other["sample"]))
    return None


def reward_pairs(rows: Sequence[Row], config: PreferencesConfig) -> list[tuple[Row, Row]]:
    """(chosen, rejected): the best answer against the worst, the second best against the second worst, and so on.

    Both ended, are worth different rewards, ``min_margin`` apart at least, and no answer is used twice.
    """
    ranked = sorted(_distinct(rows), key=lambda row: (-row["reward"], row["sample"]))
    pairs = list(zip(ranked, reversed(ranked), strict=True))[: len(ranked) // 2]
    apart = [(best, worst) for best, worst in pairs if best["reward"] - worst["reward"] >= config.min_margin]
    return [(best, worst) for best, worst in apart if best["reward"] > worst["reward"]][: config.max_pairs_per_prompt]


def correctness_pairs(rows: Sequence[Row], config: PreferencesConfig) -> list[tuple[Row, Row]]:
    """(chosen, rejected): a right answer against a wrong one, in the order sampled; both ended, none is used twice."""
    distinct = _distinct(rows)
    right, wrong = ([row for row in distinct if row["correct"] is verdict] for verdict in (True, False))
    return list(zip(right, wrong, strict=False))[: config.max_pairs_per_prompt]


def _distinct(rows: Sequence[Row]) -> list[Row]:
    """The answers that ended and say something, each text once, in the order sampled."""
    found: dict[str, Row] = {}
    for row in rows:
        if row["ended"] and row["completion"]:
            found.setdefault(" ".join(row["completion"].split()), row)
    return list(found.values())


RULES: dict[str, Callable[[Sequence[Row], PreferencesConfig], list[tuple[Row, Row]]]] = {
    "brevity": brevity_pairs,
    "reward": reward_pairs,
    "correctness": correctness_pairs,
}
"""Rules to functions from the answers to one prompt to its pairs."""

NO_PAIR = {
    "brevity": "the same verdict and different length",
    "reward": "rewards that are far enough apart",
    "correctness": "different verdicts",
}
"""What two answers of a pair must have."""

REMEDY = {
    "brevity": "allow pairs of wrong answers (preferences.only_correct = false)",
    "reward": "lower preferences.min_margin, or take rewards that tell more answers apart",
    "correctness": "take another preferences.rule",
}
"""What else can be done where there is no pair."""


def run(config: PreferencesConfig, inputs: Inputs, workspace: Workspace) -> Metrics:
    """Sample and pair, or read pairs. Raises ``DataError`` if there is none to train on."""
    source = inputs["prompts"]
    assert isinstance(source, Artifact)
    if config.rule == "data":
        return (_examples_of_data if config.unpaired else _from_data)(source, workspace)
    model = inputs.get("model")
    if not isinstance(model, Artifact):
        raise ConfigError(
            f"preferences.rule: {config.rule!r} samples answers, but the step has no model; give it an input `model`, "
            "or take the rule 'data'"
        )
    train = _take(read_prompts(source.path, "train")[::-1], config.num_prompts, "num_prompts", "train")
    validation = _take(read_prompts(source.path, "validation"), config.num_validation, "num_validation", "validation")
    assert_not_held_out((prompt.question for prompt in train), source.path)
    rewards = load_rewards(config.rewards, inputs)
    rewards.log_sandbox(train, workspace)
    rows = sample_in_chunks(
        model,
        [*train, *validation],
        config,
        form="chat",
        purpose="preferences",
        rewards=rewards,
        workspace=workspace,
    )
    if distributed.is_main():
        write_rows(workspace.output / "samples.arrow", rows, scored_schema(rewards))
    groups = by_prompt(rows)
    if config.unpaired:
        return _write_examples(
            judged_examples(groups[: len(train)], train, config, split="train"),
            judged_examples(groups[len(train) :], validation, config, split="validation"),
            workspace,
        ) | reward_metrics(groups, rewards)
    rule = RULES[config.rule]
    pairs: dict[str, list[tuple[Row, Row]]] = {
        split: [pair for group in part for pair in rule(group, config)]
        for split, part in (("train", groups[: len(train)]), ("validation", groups[len(train) :]))
    }
    if not pairs["train"]:
        raise DataError(
            f"preferences: none of {len(train)} prompts gave two answers with {NO_PAIR[config.rule]}; sample more "
            f"answers (preferences.num_generations), train the model further, or {REMEDY[config.rule]}"
        )
    metrics = _metrics(rows, pairs, num_train=len(train), num_validation=len(validation)) | reward_metrics(
        groups, rewards
    )
    if distributed.is_main():
        table = [_row(split, *pair) for split, part in pairs.items() for pair in part]
        write_rows(workspace.output / PAIRS_FILE, table, PAIR_SCHEMA)
        write_atomically(workspace.report / "report.html", _report(pairs["train"], metrics))
    return metrics


def _from_data(source: Artifact, workspace: Workspace) -> Metrics:
    """The pairs that people made, once they are found to be fit for training."""
    if not (source.path / PAIRS_FILE).exists():
        raise DataError(
            f"preferences.rule: 'data' reads {PAIRS_FILE} of the input `prompts`, which has none ({source.uri}); make "
            "the prompts from a preference set, or take a rule that samples"
        )
    train, validation = read_pairs(source.path, "train"), read_pairs(source.path, "validation")
    if not train:
        raise DataError(
            f"preferences: {source.uri} holds no pairs of the train split; raise the share of training, or take "
            "preferences.unpaired where the set holds unpaired completions"
        )
    check_pairs(train, validation)
    assert_not_held_out((text for pair in train for text in pair.questions), source.path)
    metrics: Metrics = {
        "pairs": len(train),
        "validation_pairs": len(validation),
        "edited_ratio": sum(pair.edited is not None for pair in train) / len(train),
        "chosen_words": sum(len(pair.chosen.split()) for pair in train) / len(train),
        "rejected_words": sum(len(pair.rejected.split()) for pair in train) / len(train),
    }
    if distributed.is_main():
        write_rows(workspace.output / PAIRS_FILE, [vars(pair) for pair in (*train, *validation)], PAIR_SCHEMA)
        examples: list[dict[str, report.Cell]] = [
            {"question": pair.prompt[-1]["content"], "chosen": pair.ranking[0], "rejected": pair.rejected}
            for pair in train[:30]
        ]
        page = report.page("Preferences", {"The first pairs": report.table(examples)}, key_figures=dict(metrics))
        write_atomically(workspace.report / "report.html", page)
    return metrics


# --- unpaired completions
# -----------------------------------------------------------------------------------------------


def judged_examples(
    groups: Sequence[Sequence[Row]], prompts: Sequence[Prompt], config: PreferencesConfig, *, split: PairSplit
) -> list[UnpairedExample]:
    """Every distinct answer that ended, desirable or not, of the groups of answers to each prompt.

    Where correctness decides, prompts that no verifier can judge are left out: all their answers would be wrong.
    """
    return [
        UnpairedExample(
            prompt.id,
            split,
            [_user(prompt.question)],
            row["completion"],
            row["correct"] if config.threshold is None else row["reward"] >= config.threshold,
        )
        for prompt, group in zip(prompts, groups, strict=True)
        if config.rule == "reward" or prompt.verifier != "none"
        for row in _distinct(group)
    ]


def _examples_of_data(source: Artifact, workspace: Workspace) -> Metrics:
    """The unpaired completions that people judged."""
    if not (source.path / EXAMPLES_FILE).exists():
        raise DataError(
            f"preferences.unpaired: rule 'data' reads {EXAMPLES_FILE} of the input `prompts`, which has none "
            f"({source.uri}); make the prompts from a preference set whose rows have a `label`, or leave unpaired out "
            "(`kto` makes two answers of a pair)"
        )
    train = read_examples(source.path, "train")
    assert_not_held_out((text for example in train for text in example.questions), source.path)
    return _write_examples(train, read_examples(source.path, "validation"), workspace)


def _write_examples(
    train: Sequence[UnpairedExample], validation: Sequence[UnpairedExample], workspace: Workspace
) -> Metrics:
    """Write unpaired completions that are fit for training. Raises ``DataError`` where they are not."""
    check_examples(train, validation)
    num_desirable = sum(example.label for example in train)
    if num_desirable in (0, len(train)):
        raise DataError(
            f"preferences: {num_desirable} of {len(train)} answers are desirable, expected some of each kind; sample "
            "more (preferences.num_generations), set another preferences.threshold, or take another rule"
        )
    metrics: Metrics = {
        "unpaired_examples": len(train),
        "validation_unpaired_examples": len(validation),
        "desirable_ratio": num_desirable / len(train),
        "prompts_with_completion": len({str(example.prompt) for example in train}),
    }
    if distributed.is_main():
        write_rows(workspace.output / EXAMPLES_FILE, [vars(item) for item in (*train, *validation)], EXAMPLE_SCHEMA)
        shown: list[dict[str, report.Cell]] = [
            {"question": item.prompt[-1]["content"], "completion": item.completion, "label": str(item.label)}
            for item in train[:30]
        ]
        page = report.page("Preferences", {"The first answers": report.table(shown)}, key_figures=dict(metrics))
        write_atomically(workspace.report / "report.html", page)
    return metrics


# --- parts --------------------------------------------------------------------------------------------------------


def _user(question: str) -> Message:
    return {"role": "user", "content": question}


def _take(prompts: list[Prompt], count: int, name: str, split: str) -> list[Prompt]:
    if count > len(prompts):
        raise ConfigError(
            f"preferences.{name}: got {count}, the {split} split holds {len(prompts)}; lower it or raise "
            f"prompts.num_{split}"
        )
    return prompts[:count]


def _row(split: str, chosen: Row, rejected: Row) -> Row:
    return {
        "prompt_id": chosen["prompt_id"],
        "split": split,
        "prompt": [_user(chosen["question"])],
        "chosen": chosen["completion"],
        "rejected": rejected["completion"],
        "edited": None,
    }


def _metrics(
    rows: Sequence[Row], pairs: dict[str, list[tuple[Row, Row]]], *, num_train: int, num_validation: int
) -> Metrics:
    train, validation = pairs["train"], pairs["validation"]
    return {
        "pairs": len(train),
        "validation_pairs": len(validation),
        "prompts_with_pair_ratio": len({chosen["prompt_id"] for chosen, _ in train}) / num_train,
        "validation_prompts_with_pair_ratio": len({chosen["prompt_id"] for chosen, _ in validation}) / num_validation,
        "chosen_words": sum(chosen["num_words"] for chosen, _ in train) / len(train),
        "rejected_words": sum(rejected["num_words"] for _, rejected in train) / len(train),
        "correct_ratio": sum(row["correct"] for row in rows) / len(rows),
        "mean_words": sum(row["num_words"] for row in rows) / len(rows),
    }


def _report(pairs: Sequence[tuple[Row, Row]], metrics: Metrics) -> str:
    examples: list[dict[str, Any]] = [
        {"question": chosen["question"], "chosen": chosen["completion"], "rejected": rejected["completion"]}
        for chosen, rejected in pairs[:30]
    ]
    figures = {
        "pairs": metrics["pairs"],
        "of the prompts gave a pair": f"{metrics['prompts_with_pair_ratio']:.1%}",
        "words chosen": metrics["chosen_words"],
        "words rejected": metrics["rejected_words"],
    }
    return report.page("Preferences", {"The first pairs": report.table(examples)}, key_figures=figures)


STAGE = Stage(
    name="preferences",
    output="Preferences",
    config=PreferencesConfig,
    run=run,
    inputs={"prompts": "Prompts"},
    optional_inputs={"model": "Checkpoint", "reward_model": "Checkpoint"},
    external=external,
    distributed=True,
    main_metric="pairs",
)
