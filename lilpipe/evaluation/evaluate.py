"""Stage ``evaluate``: how good the model is after each training stage, on the same held-out prompts.

For each model: bits per byte of validation text, accuracy of the likeliest answer, mean accuracy of sampled answers,
pass@k, all of them by family too, each with its number of prompts and its standard error. The base model (the one
whose stage is ``pretrain``) meets the questions in the text form of its pretraining, all others in chat form. Each
chat model's sampled answers are set against the reference model's by a fixed rule (``rewards.brevity_win``).

Sample i of a model meets sample i + 1 of the reference: two draws that do not share a random stream, so that the
reference against itself is a fair game of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from matplotlib.figure import Figure

from lilpipe import distributed, report
from lilpipe.alignment.chunks import Row, run_chunks
from lilpipe.alignment.completions import PromptForm, complete
from lilpipe.alignment.prompts import Prompt, read_prompts
from lilpipe.alignment.rewards import brevity_win
from lilpipe.alignment.sampling import SAMPLE_SCHEMA, by_prompt, sample_rows
from lilpipe.artifact import Artifact, Inputs, write_atomically
from lilpipe.config import EvaluateConfig
from lilpipe.errors import ConfigError
from lilpipe.evaluation.bits_per_byte import bits_per_byte
from lilpipe.evaluation.pass_at_k import Estimate, mean_estimate, pass_at_k, share_estimate
from lilpipe.model.hub import load_model
from lilpipe.model.transformer import Transformer
from lilpipe.seeds import derive_seed
from lilpipe.stage import Metrics, Stage, Workspace
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.tokens.loader import corpus_validation_shares, validation_rows
from lilpipe.tokens.shards import TokenShards

EVALUATION_SCHEMA = SAMPLE_SCHEMA.append(pa.field("greedy", pa.bool_()))
BITS_SCHEMA = pa.schema([("bits_per_byte", pa.float64())])
BASE_STAGE = "pretrain"


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate."""

    name: str
    artifact: Artifact
    is_base: bool

    @property
    def form(self) -> PromptForm:
        """How it meets a question."""
        return "text" if self.is_base else "chat"


# --- sampling -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _load(directory: Path) -> tuple[Transformer, Tokenizer]:
    model, tokenizer = load_model(directory)
    return model.to(distributed.device()), tokenizer


def sample_all(
    candidates: Sequence[Candidate], prompts: Sequence[Prompt], config: EvaluateConfig, workspace: Workspace
) -> dict[str, list[Row]]:
    """By model: for each prompt the greedy answer and ``samples_per_prompt`` drawn ones, as rows."""
    assert config.seed is not None
    seed, size = config.seed, config.prompts_per_chunk
    num_parts = -(-len(prompts) // size)
    greedy = config.sampling.model_copy(update={"temperature": 0.0, "top_p": 1.0})

    def work(index: int) -> list[Row]:
        which, part = divmod(index, num_parts)
        model, tokenizer = _load(candidates[which].artifact.path)
        rows = []
        for sampling, num_samples in ((greedy, 1), (config.sampling, config.samples_per_prompt)):
            groups = complete(
                model,
                tokenizer,
                prompts[part * size : (part + 1) * size],
                form=candidates[which].form,
                sampling=sampling,
                seed=derive_seed(seed, "evaluate", part),
                num_samples=num_samples,
            )
            rows += [{**row, "greedy": sampling is greedy} for row in sample_rows(groups)]
        return rows

    num_chunks = len(candidates) * num_parts
    rows = run_chunks(work, num_chunks, name="samples", schema=EVALUATION_SCHEMA, workspace=workspace)
    each = len(rows) // len(candidates)
    return {c.name: rows[index * each : (index + 1) * each] for index, c in enumerate(candidates)}


def validation_bits(
    candidates: Sequence[Candidate], tokens: Artifact, config: EvaluateConfig, workspace: Workspace
) -> dict[str, float]:
    """By model: bits per byte on ``validation_rows`` rows of the corpus's validation split."""
    shards = TokenShards.open(tokens.path)

    def work(index: int) -> list[Row]:
        model, tokenizer = _load(candidates[index].artifact.path)
        if tokenizer.digest != shards.tokenizer_digest:
            raise ConfigError(
                f"evaluate: model {candidates[index].name!r} and the tokens were made with different tokenizers; "
                "check the step's inputs"
            )
        return [{"bits_per_byte": _bits(model, shards, config.validation_rows)}]

    rows = run_chunks(work, len(candidates), name="bits", schema=BITS_SCHEMA, workspace=workspace)
    return {candidate.name: row["bits_per_byte"] for candidate, row in zip(candidates, rows, strict=True)}


def _bits(model: Transformer, shards: TokenShards, num_rows: int) -> float:
    seq_len = model.config.max_seq_len
    bits = 0.0
    for stream, share in corpus_validation_shares(shards, seq_len=seq_len).items():
        rows = max(1, round(share * num_rows))
        inputs_BT, targets_BT, num_bytes = validation_rows(shards, stream, num_rows=rows, seq_len=seq_len)
        bits += share * bits_per_byte(model, inputs_BT.to(model.device), targets_BT.to(model.device), num_bytes)
    return bits


# --- scores -------------------------------------------------------------------------------------------------------


def score(rows: Sequence[Row]) -> dict[str, Estimate]:
    """Estimates from one model's rows; the name of pass@k holds the number of samples."""
    greedy = [row for row in rows if row["greedy"]]
    groups = by_prompt([row for row in rows if not row["greedy"]])
    k = len(groups[0])
    corrects = [sum(row["correct"] for row in group) for group in groups]
    return {
        "accuracy": share_estimate(sum(row["correct"] for row in greedy), len(greedy)),
        "sampled_accuracy": mean_estimate([correct / k for correct in corrects]),
        f"pass_at_{k}": mean_estimate([pass_at_k(k, correct, k) for correct in corrects]),
        "well_formed": share_estimate(sum(row["well_formed"] for row in greedy), len(greedy)),
        "words": mean_estimate([float(row["num_words"]) for row in greedy]),
    }


def win_rate(rows: Sequence[Row], reference: Sequence[Row]) -> Estimate:
    """Share of games that a model's sampled answers win against the reference's, ties as half."""
    means = []
    ours = by_prompt([row for row in rows if not row["greedy"]])
    theirs = by_prompt([row for row in reference if not row["greedy"]])
    for mine, other in zip(ours, theirs, strict=True):
        games = zip(mine, [*other[1:], other[0]], strict=True)
        wins = [brevity_win((a["well_formed"], b["well_formed"]), (a["num_words"], b["num_words"])) for a, b in games]
        means.append(sum(wins) / len(wins))
    return mean_estimate(means)


def accuracy_gain(rows: Sequence[Row], before: Sequence[Row]) -> Estimate:
    """Difference of greedy accuracy on the same prompts; being paired, its error is below that of two accuracies."""
    pairs = zip((r for r in rows if r["greedy"]), (r for r in before if r["greedy"]), strict=True)
    return mean_estimate([float(a["correct"]) - float(b["correct"]) for a, b in pairs])


def score_all(
    candidates: Sequence[Candidate], rows: Mapping[str, Sequence[Row]], reference: str | None
) -> dict[str, dict[str, Estimate]]:
    """By model: ``score``, the gain over the model before it, and the win rate of a chat model."""
    scores: dict[str, dict[str, Estimate]] = {}
    before: Sequence[Row] | None = None
    for candidate in candidates:
        mine = rows[candidate.name]
        scores[candidate.name] = score(mine)
        if before is not None:
            scores[candidate.name]["accuracy_gain"] = accuracy_gain(mine, before)
        if reference is not None and not candidate.is_base:
            scores[candidate.name]["win_rate"] = win_rate(mine, rows[reference])
        before = mine
    return scores


def score_families(rows: Sequence[Row]) -> dict[str, dict[str, Estimate]]:
    """``score`` for each family."""
    families = sorted({row["family"] for row in rows})
    return {family: score([row for row in rows if row["family"] == family]) for family in families}


# --- the stage ----------------------------------------------------------------------------------------------------


def run(config: EvaluateConfig, inputs: Inputs, workspace: Workspace) -> Metrics:
    """Evaluate every model of ``models``, in their order."""
    candidates, reference = _candidates(inputs)
    source, tokens = inputs["prompts"], inputs.get("tokens")
    assert isinstance(source, Artifact)
    prompts = read_prompts(source.path, config.split)
    entrants = candidates if reference is None or reference in candidates else [*candidates, reference]
    rows = sample_all(entrants, prompts, config, workspace)
    bits = validation_bits(candidates, tokens, config, workspace) if isinstance(tokens, Artifact) else {}
    scores = score_all(candidates, rows, reference.name if reference else None)
    if distributed.is_main():
        names = [candidate.name for candidate in candidates]
        document = {
            "split": config.split,
            "num_prompts": len(prompts),
            "samples_per_prompt": config.samples_per_prompt,
            "reference": reference.name if reference else None,
            "models": {name: _nested(scores[name], rows[name], bits.get(name)) for name in names},
        }
        write_atomically(workspace.output / "metrics.json", json.dumps(document, indent=2, sort_keys=True) + "\n")
        write_atomically(workspace.output / "samples.jsonl", side_by_side(prompts, {n: rows[n] for n in names}))
        write_atomically(workspace.report / "report.html", _report(config, scores, rows, bits, prompts))
    return flat_metrics(scores, bits)


def _candidates(inputs: Inputs) -> tuple[list[Candidate], Candidate | None]:
    models, reference = inputs["models"], inputs.get("reference")
    artifacts = models if isinstance(models, tuple) else (models,)
    candidates = [_candidate(artifact) for artifact in artifacts]
    names = [candidate.name for candidate in candidates]
    if len(set(names)) != len(names):
        raise ConfigError(f"evaluate: the inputs `models` must come from different steps, got {names}")
    if not isinstance(reference, Artifact):
        return candidates, None
    rival = _candidate(reference)
    for candidate in candidates:
        if candidate.name == rival.name:
            return candidates, candidate
    return candidates, rival


def _candidate(artifact: Artifact) -> Candidate:
    return Candidate(artifact.manifest.step, artifact, is_base=artifact.manifest.stage == BASE_STAGE)


def flat_metrics(scores: Mapping[str, Mapping[str, Estimate]], bits: Mapping[str, float]) -> Metrics:
    """``<metric>/<model>`` and ``<metric>_stderr/<model>``; ``final_accuracy`` is the last model's."""
    metrics: Metrics = {}
    for model, estimates in scores.items():
        for name, estimate in estimates.items():
            metrics[f"{name}/{model}"] = estimate.value
            metrics[f"{name}_stderr/{model}"] = estimate.stderr
    metrics |= {f"bits_per_byte/{model}": value for model, value in bits.items()}
    last = list(scores.values())[-1]["accuracy"]
    return {**metrics, "final_accuracy": last.value, "num_prompts": last.n}


def _nested(scores: Mapping[str, Estimate], rows: Sequence[Row], bits: float | None) -> dict[str, Any]:
    def plain(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
        return {name: vars(estimate) for name, estimate in estimates.items()}

    families = {family: plain(estimates) for family, estimates in score_families(rows).items()}
    return {**plain(scores), "bits_per_byte": bits, "by_family": families}


def side_by_side(prompts: Sequence[Prompt], rows: Mapping[str, Sequence[Row]]) -> str:
    """JSON lines, one a prompt: what each model answered, greedily and in its first draw."""
    answers: dict[str, dict[str, dict[str, Any]]] = {prompt.id: {} for prompt in prompts}
    for model, model_rows in rows.items():
        for row in model_rows:
            if row["sample"] == 0:
                kind = "greedy" if row["greedy"] else "sampled"
                verdict = {"response": row["response"], "correct": row["correct"]}
                answers[row["prompt_id"]].setdefault(model, {})[kind] = verdict
    lines = [json.dumps({**vars(prompt), "models": answers[prompt.id]}, ensure_ascii=False) for prompt in prompts]
    return "".join(f"{line}\n" for line in lines)


# --- the report ---------------------------------------------------------------------------------------------------


def _report(
    config: EvaluateConfig,
    scores: Mapping[str, Mapping[str, Estimate]],
    rows: Mapping[str, Sequence[Row]],
    bits: Mapping[str, float],
    prompts: Sequence[Prompt],
) -> str:
    names = list(dict.fromkeys(name for estimates in scores.values() for name in estimates))
    table: list[dict[str, report.Cell]] = [
        {
            "model": model,
            **{name: _cell(estimates.get(name)) for name in names},
            "bits_per_byte": f"{bits[model]:.3f}" if model in bits else "",
        }
        for model, estimates in scores.items()
    ]
    by_family = {model: score_families(rows[model]) for model in scores}
    families = sorted({row["family"] for row in rows[next(iter(scores))]})
    family_table: list[dict[str, report.Cell]] = [
        {"family": family, **{model: _cell(by_family[model][family]["accuracy"]) for model in scores}}
        for family in families
    ]
    sections = {
        "After each stage": [
            report.note(f"{len(prompts)} prompts of the {config.split} split; ± is one standard error."),
            report.table(table),
            report.figure(_picture(scores)),
        ],
        "Greedy accuracy by family": report.table(family_table),
        "The same prompts, model by model": _examples(prompts[:20], rows, list(scores)),
    }
    last = list(scores.values())[-1]
    figures = {name.replace("_", " "): f"{estimate.value:.3f}" for name, estimate in last.items()}
    return report.page("Evaluation", sections, subtitle="Key figures are the last model's.", key_figures=figures)


def _cell(estimate: Estimate | None) -> str:
    return "" if estimate is None else f"{estimate.value:.3f} ± {estimate.stderr:.3f}"


def _picture(scores: Mapping[str, Mapping[str, Estimate]]) -> Figure:
    picture = Figure(figsize=(7, 3.2))
    axes = picture.subplots()
    shown = [name for name in next(iter(scores.values())) if name in ("accuracy", "sampled_accuracy")]
    shown += [name for name in next(iter(scores.values())) if name.startswith("pass_at_")]
    width = 0.8 / len(shown)
    for index, name in enumerate(shown):
        estimates = [model[name] for model in scores.values()]
        places = [place + (index - (len(shown) - 1) / 2) * width for place in range(len(scores))]
        heights, errors = [e.value for e in estimates], [e.stderr for e in estimates]
        label = name.replace("_", " ")
        axes.bar(places, heights, width, yerr=errors, label=label, color=report.COLOURS[index], capsize=2)
    axes.set_xticks(range(len(scores)), list(scores))
    axes.set(ylabel="share of prompts", ylim=(0, 1))
    axes.legend(frameon=False, ncols=len(shown), loc="lower center", bbox_to_anchor=(0.5, 1))
    return picture


def _examples(prompts: Sequence[Prompt], rows: Mapping[str, Sequence[Row]], models: Sequence[str]) -> list[str]:
    greedy = {(model, row["prompt_id"]): row for model in models for row in rows[model] if row["greedy"]}
    blocks = []
    for prompt in prompts:
        lines = []
        for model in models:
            row = greedy[model, prompt.id]
            lines.append(f"{model} [{'correct' if row['correct'] else 'wrong'}]: {row['response']}")
        blocks.append(report.text_block("\n".join(lines), title=prompt.question, detail=f"answer: {prompt.answer}"))
    return blocks


STAGE = Stage(
    name="evaluate",
    output="Report",
    config=EvaluateConfig,
    run=run,
    inputs={"models": "Checkpoint", "prompts": "Prompts"},
    optional_inputs={"reference": "Checkpoint", "tokens": "TokenShards"},
    distributed=True,
    main_metric="final_accuracy",
)
