"""Supervised fine-tuning on a CPU beside TRL's ``SFTTrainer``: useful tokens/s and peak memory.

    python -m tests.benchmarks.sft [--rounds 5] [--threads 2] [--size small] [--batch-size 16] [--only NAME ...]

See ``beside_trl`` for how both are measured. One optimizer step is taken for each ``--batch-size`` conversations (with
TRL's packing: for the rows that hold as many). Useful tokens are those of the conversations, prompt and answer. The
length of questions and answers is that of short instructions: a median of 8 and 7 words, up to 22 and 37. TRL's
settings tried: packing or not, batches of like lengths or not, and the allocator's settings that a training process of
ours is started with. Its loss takes logits in chunks by default (1.16), as ours does.
"""

from __future__ import annotations

import tempfile
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from lilpipe.config.sft import SFTConfig
from lilpipe.config.training import OptimizerConfig
from lilpipe.schemas.examples import Conversation, read_conversations, write_conversations
from lilpipe.schemas.messages import Message
from lilpipe.stage import Workspace
from lilpipe.tokenizer.chat_template import render
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.training import finetune
from lilpipe.training.conversation_encoding import encode
from lilpipe.training.supervised import SupervisedTokens
from tests.benchmarks.beside_trl import (
    MAX_SEQ_LEN,
    System,
    Watch,
    compare,
    save_start,
    train_ours,
    train_theirs,
    trl_settings,
)

NUM_CONVERSATIONS = {"small": 480, "medium": 128}
QUESTION, ANSWER = (8, 0.45, 22), (7, 0.7, 37)
"""Median, spread of the logarithm, and most words of a message."""
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, weight_decay=0.0, schedule="constant")
OURS: dict[str, dict[str, Any]] = {"lilpipe": {}, "lilpipe, not packed": {"packing": False}}
THEIRS: dict[str, dict[str, Any]] = {
    "TRL": {},
    "TRL, like lengths": {"train_sampling_strategy": "group_by_length"},
    "TRL, packed": {"packing": True, "max_length": MAX_SEQ_LEN},
    "TRL, like lengths, our memory settings": {"train_sampling_strategy": "group_by_length"},
    "TRL, packed, our memory settings": {"packing": True, "max_length": MAX_SEQ_LEN},
}


def prepare(root: Path, size: str, num_conversations: int) -> None:
    """A model, its tokenizer and the conversations."""
    tokenizer, excerpts = save_start(root, size)
    talks: list[Conversation] = []
    while len(talks) < num_conversations:
        question: Message = {"role": "user", "content": excerpts.draw(QUESTION)}
        answer: Message = {"role": "assistant", "content": excerpts.draw(ANSWER)}
        if len(render(tokenizer, [question, answer])[0]) <= MAX_SEQ_LEN:  # the peer would cut it, we leave it out
            talks.append(Conversation(str(len(talks)), "", "written", [question, answer]))
    write_conversations(root / "conversations.arrow", talks)


def run_lilpipe(settings: dict[str, Any], root: Path, batch_size: int) -> None:
    """The stage's own objective and loop."""
    config = SFTConfig(seed=0, num_epochs=2, batch_size=batch_size, optimizer=OPTIMIZER, **settings)
    tokenizer = Tokenizer.load(root)
    examples = encode(tokenizer, read_conversations(root), max_len=MAX_SEQ_LEN).fitting
    workers = finetune.Workers(config)
    objective = SupervisedTokens(
        examples, batch_size=batch_size, seed=0, padding_id=tokenizer.padding_id, packing=config.packing
    )
    trainer_module = finetune.build(config, root, objective, workers, stage="sft")
    with tempfile.TemporaryDirectory() as work:
        train_ours(
            trainer_module,
            Workspace(Path(work)),
            config,
            config.optimizer,
            steps_of_epoch=len(examples) // batch_size,
            watch=Watch(),
            num_tokens=sum(len(example.ids) for example in examples),
        )


def run_trl(settings: dict[str, Any], root: Path, batch_size: int) -> None:
    """``SFTTrainer`` on the assistant's tokens."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trl: Any = import_module("trl")
    tokenizer = AutoTokenizer.from_pretrained(root)
    talks = [item.messages for item in read_conversations(root)]
    num_tokens = sum(len(tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"]) for talk in talks)
    if settings.get("packing"):  # rows that hold as many conversations as a batch of the others
        batch_size = max(1, round(batch_size * num_tokens / len(talks) / MAX_SEQ_LEN))
    with tempfile.TemporaryDirectory() as work:
        trainer = trl.SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(root),
            args=trl.SFTConfig(
                **trl_settings(work, batch_size=batch_size, optimizer=OPTIMIZER),
                assistant_only_loss=True,
                dataloader_drop_last=not settings.get("packing"),
                **settings,
            ),
            train_dataset=datasets.Dataset.from_list([{"messages": talk} for talk in talks]),
            processing_class=tokenizer,
        )
        train_theirs(trainer, watch=Watch(), num_tokens=num_tokens)


SYSTEMS: dict[str, System] = {
    **{name: partial(run_lilpipe, settings) for name, settings in OURS.items()},
    **{name: partial(run_trl, settings) for name, settings in THEIRS.items()},
}

if __name__ == "__main__":
    compare("tests.benchmarks.sft", SYSTEMS, prepare, examples=NUM_CONVERSATIONS, columns=["training", "training_cpu"])
