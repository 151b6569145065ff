"""Stage ``preferences``: pairs of a chosen and a rejected completion, by a configured rule.

Completions are sampled from the model that DPO starts from, so that pairs reflect its behaviour. ``brevity`` pairs two
completions to a prompt with the same verdict of the verifier and prefers the one with fewer words: they differ in
style, which SFT on correct completions does not teach. ``reward`` pairs the completion of the highest reward with that
of the lowest. ``correctness`` pairs a correct with an incorrect completion. ``data`` reads human preference pairs.
``unpaired`` labels each completion separately instead (``examples.arrow``), for KTO (Ethayarajh et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lilpipe import distributed, page
from lilpipe.alignment.preference.pairing_rules import NO_PAIR, REMEDY, RULES, distinct
from lilpipe.alignment.rewards.reward_functions import external
from lilpipe.alignment.rollout.completion_rows import (
    by_prompt,
    load_rewards,
    reward_metrics,
    sample_in_chunks,
    scored_schema,
)
from lilpipe.artifact import Artifact, Inputs, one_input, optional_input, write_atomically
from lilpipe.config.preferences import PreferencesConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.schemas.chunks import Row
from lilpipe.schemas.examples import Prompt, check_not_held_out, read_prompts
from lilpipe.schemas.messages import Message
from lilpipe.schemas.pairs import (
    EXAMPLES_FILE,
    PAIRS_FILE,
    Pair,
    PairSplit,
    UnpairedExample,
    check_examples,
    check_pairs,
    read_examples,
    read_pairs,
    write_examples,
    write_pairs,
)
from lilpipe.schemas.tables import write_rows
from lilpipe.stage import Metrics, Stage, Workspace


def run(config: PreferencesConfig, inputs: Inputs, workspace: Workspace) -> Metrics:
    """Sample completions and pair them, or read pairs. Raises ``DataError`` if there are no training pairs."""
    source = one_input(inputs, "prompts")
    if config.rule == "data":
        return (_examples_of_data if config.unpaired else _from_data)(source, workspace)
    model = optional_input(inputs, "model")
    if model is None:
        raise ConfigError(
            f"preferences.rule: {config.rule!r} samples completions, but the step has no model; add an input `model`, "
            "or use rule 'data'"
        )
    train = _take(read_prompts(source.path, "train")[::-1], config.num_prompts, "num_prompts", "train")
    validation = _take(read_prompts(source.path, "validation"), config.num_validation, "num_validation", "validation")
    check_not_held_out((prompt.question for prompt in train), source.path)
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
            f"preferences: none of {len(train)} prompts gave two completions with {NO_PAIR[config.rule]}; sample more "
            f"completions (preferences.num_generations), train the model further, or {REMEDY[config.rule]}"
        )
    metrics = _metrics(rows, pairs, num_train=len(train), num_validation=len(validation)) | reward_metrics(
        groups, rewards
    )
    if distributed.is_main():
        write_pairs(
            workspace.output / PAIRS_FILE, [_pair(split, *pair) for split, part in pairs.items() for pair in part]
        )
        write_atomically(workspace.report / "report.html", _report(pairs["train"], metrics))
    return metrics


def _from_data(source: Artifact, workspace: Workspace) -> Metrics:
    """Read and check human preference pairs."""
    if not (source.path / PAIRS_FILE).exists():
        raise DataError(
            f"preferences.rule: 'data' reads {PAIRS_FILE} of the input `prompts`, which does not exist ({source.uri}); "
            "make the prompts from a preference dataset, or use a rule that samples"
        )
    train, validation = read_pairs(source.path, "train"), read_pairs(source.path, "validation")
    if not train:
        raise DataError(
            f"preferences: {source.uri} has no pairs in the train split; raise the share of training, or set "
            "preferences.unpaired if the dataset has unpaired completions"
        )
    check_pairs(train, validation)
    check_not_held_out((text for pair in train for text in pair.questions), source.path)
    metrics: Metrics = {
        "pairs": len(train),
        "validation_pairs": len(validation),
        "edited_ratio": sum(pair.edited is not None for pair in train) / len(train),
        "chosen_words": sum(len(pair.chosen.split()) for pair in train) / len(train),
        "rejected_words": sum(len(pair.rejected.split()) for pair in train) / len(train),
    }
    if distributed.is_main():
        write_pairs(workspace.output / PAIRS_FILE, [*train, *validation])
        examples: list[dict[str, page.Cell]] = [
            {"question": pair.prompt[-1]["content"], "chosen": pair.ranking[0], "rejected": pair.rejected}
            for pair in train[:30]
        ]
        html = page.render("Preferences", {"First pairs": page.table(examples)}, key_figures=dict(metrics))
        write_atomically(workspace.report / "report.html", html)
    return metrics


# --- unpaired completions -----------------------------------------------------------------------------------------


def judged_examples(
    groups: Sequence[Sequence[Row]], prompts: Sequence[Prompt], config: PreferencesConfig, *, split: PairSplit
) -> list[UnpairedExample]:
    """Return every distinct completion that ended, labelled desirable or not.

    Rule ``correctness`` skips prompts without a verifier: all their completions would count as incorrect.
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
        for row in distinct(group)
    ]


def _examples_of_data(source: Artifact, workspace: Workspace) -> Metrics:
    """Read human-labelled unpaired completions."""
    if not (source.path / EXAMPLES_FILE).exists():
        raise DataError(
            f"preferences.unpaired: rule 'data' reads {EXAMPLES_FILE} of the input `prompts`, which does not exist "
            f"({source.uri}); make the prompts from a preference dataset whose rows have a `label`, or remove unpaired "
            "(`kto` splits a pair into two completions)"
        )
    train = read_examples(source.path, "train")
    check_not_held_out((text for example in train for text in example.questions), source.path)
    return _write_examples(train, read_examples(source.path, "validation"), workspace)


def _write_examples(
    train: Sequence[UnpairedExample], validation: Sequence[UnpairedExample], workspace: Workspace
) -> Metrics:
    """Check and write unpaired completions. Raises ``DataError`` if they are unfit for training."""
    check_examples(train, validation)
    num_desirable = sum(example.label for example in train)
    if num_desirable in (0, len(train)):
        raise DataError(
            f"preferences: {num_desirable} of {len(train)} completions are desirable, expected some of each label; "
            "sample more (preferences.num_generations), change preferences.threshold, or use another rule"
        )
    metrics: Metrics = {
        "unpaired_examples": len(train),
        "validation_unpaired_examples": len(validation),
        "desirable_ratio": num_desirable / len(train),
        "prompts_with_completion": len({str(example.prompt) for example in train}),
    }
    if distributed.is_main():
        write_examples(workspace.output / EXAMPLES_FILE, [*train, *validation])
        shown: list[dict[str, page.Cell]] = [
            {"question": item.prompt[-1]["content"], "completion": item.completion, "label": str(item.label)}
            for item in train[:30]
        ]
        html = page.render("Preferences", {"First completions": page.table(shown)}, key_figures=dict(metrics))
        write_atomically(workspace.report / "report.html", html)
    return metrics


# --- parts --------------------------------------------------------------------------------------------------------


def _user(question: str) -> Message:
    return {"role": "user", "content": question}


def _take(prompts: list[Prompt], count: int, name: str, split: str) -> list[Prompt]:
    if count > len(prompts):
        raise ConfigError(
            f"preferences.{name}: got {count}, but the {split} split has {len(prompts)}; lower it or raise "
            f"prompts.num_{split}"
        )
    return prompts[:count]


def _pair(split: str, chosen: Row, rejected: Row) -> Pair:
    prompt = [_user(chosen["question"])]
    return Pair(chosen["prompt_id"], split, prompt, chosen["completion"], rejected["completion"])


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
        "prompts with a pair": f"{metrics['prompts_with_pair_ratio']:.1%}",
        "words of chosen": metrics["chosen_words"],
        "words of rejected": metrics["rejected_words"],
    }
    return page.render("Preferences", {"First pairs": page.table(examples)}, key_figures=figures)


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
