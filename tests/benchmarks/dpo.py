"""Preference optimisation on a CPU beside TRL's ``DPOTrainer``: useful tokens/s and peak memory.

    python -m tests.benchmarks.dpo [--rounds 5] [--threads 2] [--size small] [--batch-size 16] [--only NAME ...]

See ``beside_trl`` for how both are measured. The loss is the sigmoid's. Useful tokens are those of both answers of a
pair, each behind its prompt. The pass of the reference over all pairs is timed too where it is made beforehand: ``an
epoch in all`` is both together, which is what a run of one epoch takes. Prompts and answers are as long as short
instructions: medians of 8 words of a prompt, 7 of a chosen answer, 9 of a rejected one, up to 22, 37 and 45. TRL's
settings tried: the reference beforehand or in every step, batches of like lengths or not.
"""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from lilpipe.alignment.preference.data import encode_pairs
from lilpipe.alignment.preference.dpo import compute_reference, make_packer
from lilpipe.alignment.preference.objective import PreferenceObjective
from lilpipe.config.dpo import DPOConfig
from lilpipe.config.training import OptimizerConfig
from lilpipe.model.hub import load_model
from lilpipe.schemas.messages import Message
from lilpipe.schemas.pairs import PAIR_SCHEMA, PAIRS_FILE, Pair, read_pairs
from lilpipe.schemas.tables import write_rows
from lilpipe.stage import Workspace
from lilpipe.training import finetune
from tests.benchmarks.beside_trl import (
    COLUMNS,
    MAX_SEQ_LEN,
    System,
    Watch,
    compare,
    save_start,
    train_ours,
    train_theirs,
    trl_settings,
)

NUM_PAIRS = {"small": 480, "medium": 96}
PROMPT, CHOSEN, REJECTED = (8, 0.45, 22), (7, 0.7, 37), (9, 0.7, 45)
"""Median, spread of the logarithm, and most words of a text."""
OPTIMIZER = OptimizerConfig(learning_rate=1e-4, warmup_steps=0, weight_decay=0.0, schedule="constant")
THEIRS: dict[str, dict[str, Any]] = {
    "TRL": {},
    "TRL, reference beforehand": {"precompute_ref_log_probs": True},
    "TRL, reference beforehand, like lengths": {
        "precompute_ref_log_probs": True,
        "train_sampling_strategy": "group_by_length",
        "length_column_name": "num_tokens",
        "remove_unused_columns": False,  # or the lengths would be among them
    },
}


def prepare(root: Path, size: str, num_pairs: int) -> None:
    """A model, its tokenizer and the pairs."""
    tokenizer, excerpts = save_start(root, size)
    pairs: list[Pair] = []
    while len(pairs) < num_pairs:  # those that fit the model
        prompt: list[Message] = [{"role": "user", "content": excerpts.draw(PROMPT)}]
        pair = Pair(str(len(pairs)), "train", prompt, excerpts.draw(CHOSEN), excerpts.draw(REJECTED))
        pairs += [pair] if encode_pairs(tokenizer, [pair], max_len=MAX_SEQ_LEN)[0] else []
    write_rows(root / PAIRS_FILE, [vars(pair) for pair in pairs], PAIR_SCHEMA)


def run_lilpipe(root: Path, batch_size: int) -> None:
    """The stage's own reference pass, objective and loop."""
    config = DPOConfig(seed=0, num_epochs=2, batch_size=batch_size, optimizer=OPTIMIZER, rpo_alpha=0.0)
    model, tokenizer = load_model(root)
    rows, _ = encode_pairs(tokenizer, read_pairs(root, "train"), max_len=model.config.max_seq_len)
    watch, workers = Watch(), finetune.Workers(config)
    with tempfile.TemporaryDirectory() as work:
        workspace = Workspace(Path(work))
        begun = time.perf_counter()
        packer = make_packer(model, tokenizer, config)
        _, reference_R2 = compute_reference(model, rows, packer, config, workspace)
        watch.reference = time.perf_counter() - begun
        objective = PreferenceObjective(rows, config, packer, reference_R2=reference_R2, rank=0, world_size=1)
        trainer_module = finetune.build(config, root, objective, workers, stage="dpo")
        del model
        train_ours(
            trainer_module,
            workspace,
            config,
            config.optimizer,
            steps_of_epoch=len(rows) // batch_size,
            watch=watch,
            num_tokens=sum(row.first.num_tokens + row.second.num_tokens for row in rows),
        )


def run_trl(settings: dict[str, Any], root: Path, batch_size: int) -> None:
    """``DPOTrainer``, with the pass of its reference timed."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer import dpo_config, dpo_trainer

    class Trainer(dpo_trainer.DPOTrainer):
        def _precompute_ref_logps(self, *args: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            result = super()._precompute_ref_logps(*args, **options)
            watch.reference = time.perf_counter() - begun
            return result

    tokenizer, watch = AutoTokenizer.from_pretrained(root), Watch()
    _, ours = load_model(root)
    encoded, _ = encode_pairs(ours, read_pairs(root, "train"), max_len=10_000)
    rows = [
        {
            "prompt": pair.prompt,
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
            "num_tokens": max(row.first.num_tokens, row.second.num_tokens),
        }
        for pair, row in zip(read_pairs(root, "train"), encoded, strict=True)
    ]
    with tempfile.TemporaryDirectory() as work:
        trainer = Trainer(
            model=AutoModelForCausalLM.from_pretrained(root),
            args=dpo_config.DPOConfig(
                **trl_settings(work, batch_size=batch_size, optimizer=OPTIMIZER),
                max_length=None,
                dataloader_drop_last=True,
                **settings,
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        columns = ("prompt_ids", "chosen_ids", "rejected_ids")
        lengths = zip(*(trainer.train_dataset[name] for name in columns), strict=True)
        num_tokens = sum(2 * len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected in lengths)
        train_theirs(trainer, watch=watch, num_tokens=num_tokens)


SYSTEMS: dict[str, System] = {
    "lilpipe": run_lilpipe,
    **{name: partial(run_trl, settings) for name, settings in THEIRS.items()},
}

if __name__ == "__main__":
    compare("tests.benchmarks.dpo", SYSTEMS, prepare, examples=NUM_PAIRS, columns=list(COLUMNS))
