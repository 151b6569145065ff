"""Stage ``sft``: supervised fine-tuning on conversations, with the loss on the assistant's tokens alone.

Conversations come from rejection sampling, from written demonstrations, or from both. Before a step is taken the
masks are checked against the turns that the token ids themselves show.

Dimensions: B conversations, T tokens.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilpipe import distributed
from lilpipe.alignment.order import rows_of_step
from lilpipe.alignment.prompts import Conversation, assert_not_held_out, read_conversations
from lilpipe.artifact import Artifact, Inputs, write_atomically
from lilpipe.config import SFTConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.model.hub import load_model, save_model
from lilpipe.stage import Metrics, Stage, Workspace
from lilpipe.tokenizer.chat_template import render
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.training.curves import write_report
from lilpipe.training.loop import Loss, LossFunction, train

IGNORED = -100
"""Target that does not count (torch's default)."""


@dataclass(frozen=True)
class Example:
    """A conversation as token ids, and for each whether it is supervised."""

    id: str
    ids: list[int]
    mask: list[bool]


def run(config: SFTConfig, inputs: Inputs, workspace: Workspace) -> Metrics:
    """Fine-tune. Raises ``ConfigError`` for a batch that the workers cannot share, ``DataError`` for conversations
    that are too few, all too long, wrongly masked, or held out.
    """
    source = inputs["model"]
    assert isinstance(source, Artifact)
    assert config.seed is not None
    conversations = gather_conversations(inputs, max_demonstrations=config.max_demonstrations)
    model, tokenizer = load_model(source.path)
    model = model.to(distributed.device())
    examples, too_long = encode(tokenizer, conversations, max_len=model.config.max_seq_len)
    supervised_share = check_masks(tokenizer, examples)
    num_steps = count_steps(config, len(examples))
    result = train(
        model,
        loss=supervised_loss(examples, batch_size=config.batch_size, seed=config.seed, padding_id=tokenizer.padding_id),
        num_steps=num_steps,
        workspace=workspace,
        section=config,
        optimizer=config.optimizer,
        identity={role: [item.content_digest for item in _artifacts(inputs, role)] for role in sorted(inputs)},
    )
    metrics = {
        "train_loss": result.final_loss(),
        "conversations": float(len(examples)),
        "demonstrations": float(sum(item.origin == "demonstration" for item in conversations)),
        "too_long": float(len(too_long)),
        "supervised_share": supervised_share,
        "steps": float(num_steps),
        "tokens_per_second": result.tokens_per_second,
    }
    if distributed.is_main():
        save_model(model, tokenizer, workspace.output)
        quarantine(too_long, workspace, max_len=model.config.max_seq_len)
        write_report(
            workspace,
            title="Supervised fine-tuning",
            losses=result.losses,
            config=config,
            key_figures=metrics,
            sections={"What is learnt from": "".join(show(tokenizer, example) for example in examples[:5])},
        )
    return metrics


# --- data ---------------------------------------------------------------------------------------------------------


def gather_conversations(inputs: Inputs, *, max_demonstrations: int | None) -> list[Conversation]:
    """Sampled conversations, then written ones. Raises ``DataError`` if there are none, or one is held out."""
    prompts = _artifacts(inputs, "prompts")
    sampled = [item for source in _artifacts(inputs, "conversations") for item in read_conversations(source.path)]
    written = [item for source in prompts for item in read_conversations(source.path)][:max_demonstrations]
    conversations = sampled + written
    if not conversations:
        raise DataError(
            "sft: got no conversations, expected at least one; give the step an input `conversations` or `prompts`, "
            "and leave sft.max_demonstrations above 0"
        )
    questions = [turn["content"] for item in conversations for turn in item.messages if turn["role"] == "user"]
    for source in prompts:
        assert_not_held_out(questions, source.path)
    return conversations


def encode(
    tokenizer: Tokenizer, conversations: Sequence[Conversation], *, max_len: int
) -> tuple[list[Example], list[Example]]:
    """Conversations as tokens: those that fit in ``max_len``, and those that do not. None is ever cut."""
    examples = [
        Example(item.id, *render(tokenizer, item.messages))  # type: ignore[arg-type]
        for item in conversations
    ]
    fitting = [example for example in examples if len(example.ids) <= max_len]
    if not fitting:
        shortest = min(len(example.ids) for example in examples)
        raise DataError(
            f"sft: each of the {len(examples)} conversations is longer than the model's {max_len} tokens (the shortest "
            f"has {shortest}); shorten them, or pretrain with a larger model.max_seq_len"
        )
    return fitting, [example for example in examples if len(example.ids) > max_len]


def check_masks(tokenizer: Tokenizer, examples: Sequence[Example]) -> float:
    """The share of supervised tokens, once every mask is found right.

    What must be supervised is read off the ids again: all that follows an assistant's header, up to and with the end
    of that turn, and nothing else. Raises ``DataError`` naming the conversation.
    """
    for example in examples:
        expected = assistant_turns(tokenizer, example.ids)
        if not any(expected):
            raise DataError(f"conversation {example.id}: has no finished answer of the assistant; remove it")
        if example.mask != expected:
            position = next(i for i, pair in enumerate(zip(example.mask, expected, strict=True)) if pair[0] != pair[1])
            got = "supervised" if example.mask[position] else "not supervised"
            token = tokenizer.decode([example.ids[position]])
            raise DataError(
                f"conversation {example.id}: token {position} ({token!r}) is {got}, expected the opposite: answers and "
                "their ends are learnt, prompts are not; the chat template and its mask disagree"
            )
    return sum(sum(example.mask) for example in examples) / sum(len(example.ids) for example in examples)


def assistant_turns(tokenizer: Tokenizer, ids: Sequence[int]) -> list[bool]:
    """For each token, whether it belongs to an assistant's finished turn, its end included and its header not."""
    mask = [False] * len(ids)
    start = None
    for position, token in enumerate(ids):
        if token == tokenizer.assistant_id:
            start = position + 1
        elif token == tokenizer.turn_end_id and start is not None:
            mask[start : position + 1] = [True] * (position + 1 - start)
            start = None
    return mask


# --- training -----------------------------------------------------------------------------------------------------


def count_steps(config: SFTConfig, num_examples: int) -> int:
    """Optimizer steps of all epochs together."""
    if config.batch_size % config.num_workers:
        raise ConfigError(
            f"sft.batch_size: got {config.batch_size}, expected a multiple of num_workers {config.num_workers}"
        )
    if num_examples < config.batch_size:
        raise DataError(
            f"sft: got {num_examples} conversations, expected at least one batch of {config.batch_size}; lower "
            "sft.batch_size or add conversations"
        )
    return config.num_epochs * num_examples // config.batch_size


def supervised_loss(examples: Sequence[Example], *, batch_size: int, seed: int, padding_id: int) -> LossFunction:
    """Cross-entropy summed over the supervised tokens of this worker's conversations."""
    rank, world_size, device = distributed.rank(), distributed.world_size(), distributed.device()

    def loss(model: nn.Module, step: int, micro: int) -> Loss:  # noqa: ARG001 (one micro-batch)
        rows = rows_of_step(step, num_rows=len(examples), batch_size=batch_size, seed=seed)
        rows.sort(key=lambda row: len(examples[row].ids))  # workers get rows of like lengths
        batch = [examples[row] for row in rows[rank::world_size]]
        inputs_BT, targets_BT = (part.to(device) for part in collate(batch, padding_id=padding_id))
        total = F.cross_entropy(
            model(inputs_BT).flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        num_tokens = sum(len(example.ids) for example in batch)
        return Loss(total, count=int((targets_BT != IGNORED).sum()), num_tokens=num_tokens)

    return loss


def collate(batch: Sequence[Example], *, padding_id: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [B, T], padded on the right; a target that is not supervised is ``IGNORED``."""
    num_tokens = max(len(example.ids) for example in batch) - 1
    inputs_BT = torch.full((len(batch), num_tokens), padding_id)
    targets_BT = torch.full((len(batch), num_tokens), IGNORED)
    for row, example in enumerate(batch):
        ids, mask = torch.tensor(example.ids), torch.tensor(example.mask)
        inputs_BT[row, : len(ids) - 1] = ids[:-1]
        targets_BT[row, : len(ids) - 1] = ids[1:].where(mask[1:], IGNORED)
    return inputs_BT, targets_BT


# --- report -------------------------------------------------------------------------------------------------------


def quarantine(too_long: Sequence[Example], workspace: Workspace, *, max_len: int) -> None:
    """List the conversations that were left out, in ``report/too_long.jsonl``, and say so."""
    if too_long:
        workspace.log(f"left out {len(too_long)} conversations of more than {max_len} tokens (report/too_long.jsonl)")
        lines = [json.dumps({"id": example.id, "tokens": len(example.ids), "max": max_len}) for example in too_long]
        write_atomically(workspace.report / "too_long.jsonl", "\n".join(lines) + "\n")


def show(tokenizer: Tokenizer, example: Example) -> str:
    """A conversation as HTML, the supervised tokens on a coloured ground."""
    parts = []
    for supervised, run in groupby(zip(example.ids, example.mask, strict=True), key=itemgetter(1)):
        text = html.escape(tokenizer.decode([token for token, _ in run]))
        parts.append(f'<mark style="background:#d5e8d4">{text}</mark>' if supervised else text)
    return f"<pre>{''.join(parts)}</pre>"


def _artifacts(inputs: Inputs, role: str) -> tuple[Artifact, ...]:
    """What fills a role: none, one or several artifacts."""
    value = inputs.get(role, ())
    return (value,) if isinstance(value, Artifact) else value


STAGE = Stage(
    name="sft",
    output="Checkpoint",
    config=SFTConfig,
    run=run,
    inputs={"model": "Checkpoint"},
    optional_inputs={"conversations": "Conversations", "prompts": "Prompts"},
    distributed=True,
    main_metric="train_loss",
)
