"""Stage ``rejection_sampling``: sample K answers to each prompt and keep what the verifier accepts.

Llama 3 (Grattafiori et al. 2024, section 4.2.2) does so with a reward model; here a program knows the answer. Every
sample is kept with its verdict in ``samples.arrow``; ``conversations.arrow`` holds the distinct correct answers, and
``pass_rates.arrow`` how often each prompt was solved.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
from matplotlib.figure import Figure

from lilpipe import distributed, report
from lilpipe.alignment.chunks import Row
from lilpipe.alignment.prompts import (
    Conversation,
    assert_not_held_out,
    read_prompts,
    write_conversations,
)
from lilpipe.alignment.sampling import SAMPLE_SCHEMA, by_prompt, sample_in_chunks
from lilpipe.alignment.tables import write_table
from lilpipe.artifact import Artifact, Inputs, write_atomically
from lilpipe.config import RejectionSamplingConfig
from lilpipe.errors import ConfigError
from lilpipe.evaluation.pass_at_k import mean_estimate, pass_at_k
from lilpipe.stage import Metrics, Stage, Workspace
from lilpipe.tokenizer.chat_template import Message

PASS_RATE_SCHEMA = pa.schema(
    [("prompt_id", pa.string()), ("family", pa.string()), ("num_samples", pa.int32()), ("num_correct", pa.int32())]
)


def keep_correct(rows: Sequence[Row], *, max_kept: int) -> list[Row]:
    """The first ``max_kept`` correct responses of one prompt that differ by more than white space."""
    kept: dict[str, Row] = {}
    for row in rows:
        if row["correct"]:
            kept.setdefault(" ".join(row["response"].split()), row)
    return list(kept.values())[:max_kept]


def as_conversation(row: Row) -> Conversation:
    """The prompt and a kept response as a conversation."""
    messages: list[Message] = [
        {"role": "user", "content": row["question"]},
        {"role": "assistant", "content": row["response"]},
    ]
    return Conversation(f"{row['prompt_id']}/{row['sample']}", row["prompt_id"], "rejection_sampling", messages)


def run(config: RejectionSamplingConfig, inputs: Inputs, workspace: Workspace) -> Metrics:
    """Sample, verify, keep. Raises ``ConfigError`` if more prompts are asked for than there are."""
    model, source = inputs["model"], inputs["prompts"]
    assert isinstance(model, Artifact)
    assert isinstance(source, Artifact)
    prompts = read_prompts(source.path, "train")
    if config.num_prompts > len(prompts):
        raise ConfigError(
            f"rejection_sampling.num_prompts: got {config.num_prompts}, the train split holds {len(prompts)}; lower it "
            "or raise prompts.num_train"
        )
    prompts = prompts[: config.num_prompts]
    assert_not_held_out((prompt.question for prompt in prompts), source.path)
    rows = sample_in_chunks(
        model, prompts, config, form=config.prompt_form, purpose="rejection_sampling", workspace=workspace
    )
    groups = by_prompt(rows)
    kept = [row for group in groups for row in keep_correct(group, max_kept=config.max_kept_per_prompt)]
    metrics = summarise(groups, num_kept=len(kept))
    if not kept:
        workspace.log("no sampled answer was correct: the conversations are empty; the model needs more pretraining")
    if distributed.is_main():
        write_table(workspace.output / "samples.arrow", rows, SAMPLE_SCHEMA)
        write_table(workspace.output / "pass_rates.arrow", [_pass_rate(group) for group in groups], PASS_RATE_SCHEMA)
        write_conversations(workspace.output / "conversations.arrow", [as_conversation(row) for row in kept])
        write_atomically(workspace.report / "report.html", _report(groups, kept, metrics))
    return metrics


def summarise(groups: Sequence[Sequence[Row]], *, num_kept: int) -> Metrics:
    """pass@1 and pass@K with standard errors over prompts, and how the answers look."""
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
        "ended_share": sum(row["ended"] for row in rows) / len(rows),
        "mean_words": sum(row["num_words"] for row in rows) / len(rows),
    }


def _num_correct(group: Sequence[Row]) -> int:
    return sum(row["correct"] for row in group)


def _pass_rate(group: Sequence[Row]) -> Row:
    row = group[0]
    return {
        "prompt_id": row["prompt_id"],
        "family": row["family"],
        "num_samples": len(group),
        "num_correct": _num_correct(group),
    }


def _report(groups: Sequence[Sequence[Row]], kept: Sequence[Row], metrics: Metrics) -> str:
    families = sorted({group[0]["family"] for group in groups})
    table = []
    for family in families:
        of_family = [group for group in groups if group[0]["family"] == family]
        summary = summarise(of_family, num_kept=sum(row["family"] == family for row in kept))
        table.append({"family": family, **{key: value for key, value in summary.items() if "stderr" not in key}})
    k = len(groups[0])
    picture = Figure(figsize=(6, 2.6))
    axes = picture.subplots()
    counts = [sum(_num_correct(group) == correct for group in groups) for correct in range(k + 1)]
    axes.bar(range(k + 1), counts, color=report.ACCENT)
    axes.set(xlabel=f"correct answers of {k}", ylabel="prompts")
    examples = [
        report.text_block(
            "\n".join(f"[{'correct' if row['correct'] else 'wrong'}] {row['response']}" for row in group),
            title=group[0]["question"],
            detail=f"{_num_correct(group)} of {k}",
        )
        for group in groups[:20]
    ]
    figures = {"pass@1": metrics["pass_at_1"], f"pass@{k}": metrics[f"pass_at_{k}"], "answers kept": len(kept)}
    sections = {"By family": report.table(table), "Correct answers by prompt": report.figure(picture)}
    return report.page("Rejection sampling", {**sections, "The first prompts": examples}, key_figures=figures)


STAGE = Stage(
    name="rejection_sampling",
    output="Conversations",
    config=RejectionSamplingConfig,
    run=run,
    inputs={"model": "Checkpoint", "prompts": "Prompts"},
    distributed=True,
    main_metric="pass_at_1",
)
