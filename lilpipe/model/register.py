"""Stage ``register``: writes the released model, a checkpoint with a model card, and checks that it loads.

The tracker sets its name and alias in the MLflow registry.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lilpipe.artifact import Artifact, Inputs, one_input, optional_input
from lilpipe.config.evaluate import RegisterConfig
from lilpipe.errors import ArtifactError
from lilpipe.model.flops import num_parameters
from lilpipe.model.hub import load_model, model_files
from lilpipe.model.origin import card_metadata, copy_origin, lineage, read_origin
from lilpipe.model.state_dict_adapters import Lilpipe, adapter_for
from lilpipe.model.transformer import Transformer
from lilpipe.stage import Metrics, Stage, Workspace
from lilpipe.tokenizer.encoding import Tokenizer

CARD_FILE = "README.md"
REPORT_METRICS = "metrics.json"

SAMPLE_TEXT = "Reverse the list 3, 14, 15.\n\tÉtude in naïve 日本語 🙂 <|user|>"
"""Digits, whitespace, multi-byte characters, and the name of a special token."""

CARD = """\
---
library_name: {library}
pipeline_tag: text-generation
{metadata}---

# {name}

A language model trained by lilpipe, with the architecture of {architecture}.

| | |
| --- | --- |
{facts}

## How good it is

{results}

## How to load it

{loading}

## How it was made

The last stage was `{stage}`, with these settings:

```json
{config}
```

`manifest.json` holds the way back: the artifact that this one was made from, by content, and so on to the corpus.
{lineage}"""


WITH_TRANSFORMERS = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": "..."}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**prompt, max_new_tokens=48, do_sample=False)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
```"""

WITH_PEFT = """\
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
base = AutoModelForCausalLM.from_pretrained("BASE")
model = PeftModel.from_pretrained(base, "PATH")
```

`lilpipe serve BASE --adapter NAME=PATH` serves it with OpenAI's API; BASE is the directory of the base."""

WITH_LILPIPE = "`lilpipe chat PATH` talks to it; `lilpipe serve PATH` serves it with OpenAI's API and a page to chat."

WITHOUT_TRANSFORMERS = "No class of transformers computes this model: lilpipe alone loads it."


def run(config: RegisterConfig, inputs: Inputs, workspace: Workspace) -> Metrics:  # noqa: ARG001
    """Copy the model, write its card, and load it back. Raises ``ArtifactError`` if the loaded model differs."""
    source, report = one_input(inputs, "model"), optional_input(inputs, "report")
    model, tokenizer = load_model(source.path)
    # A retry starts over, because copying is all the work.
    shutil.rmtree(workspace.output)
    workspace.output.mkdir()
    for name in model_files(source.path):
        shutil.copyfile(source.path / name, workspace.output / name)
    copy_origin(source.path, workspace.output)
    card = model_card(model, source, {} if report is None else read_metrics(report.path))
    (workspace.output / CARD_FILE).write_text(card, encoding="utf-8")
    workspace.progress(1, 2, "checks")
    verify(workspace.output, model, tokenizer)
    workspace.progress(2, 2, "checks")
    return {"num_parameters": float(num_parameters(model.config, model.vocab_size))}


def verify(directory: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    """Load the directory and compare model and tokenizer with the expected ones on a fixed input."""
    loaded, loaded_tokenizer = load_model(directory)
    ids = loaded_tokenizer.encode(SAMPLE_TEXT)
    if ids != tokenizer.encode(SAMPLE_TEXT) or loaded_tokenizer.decode(ids) != tokenizer.decode(ids):
        raise ArtifactError(
            f"{directory}: the tokenizer gives {ids[:8]}... for a fixed text, expected the same ids as the input's, "
            "which decode to the same text; rerun the stage that produced the model"
        )
    tokens_BT = fixed_batch(model)
    with torch.inference_mode():
        got, expected = loaded(tokens_BT), model(tokens_BT)
    if not torch.isfinite(expected).all():
        raise ArtifactError(
            f"{directory}: got logits that are not finite; training has diverged, train the model again"
        )
    if not torch.equal(got, expected):
        difference = (got - expected).abs().max().item()
        raise ArtifactError(
            f"{directory}: logits differ from those of the input model by {difference:.3g}, expected equal ones"
        )


def fixed_batch(model: Transformer) -> Tensor:
    """Return two rows of tokens spread over the vocabulary, ``[2, T]``."""
    num_tokens = min(64, model.config.max_seq_len)
    return (torch.arange(2 * num_tokens) * 7919 % model.vocab_size).view(2, num_tokens)


def read_metrics(directory: Path) -> dict[str, float]:
    """Return the numbers in a report's ``metrics.json`` by dotted name; empty if there is no file."""
    path = directory / REPORT_METRICS
    if not path.exists():
        return {}
    try:
        return dict(_numbers(json.loads(path.read_text(encoding="utf-8"))))
    except ValueError as error:
        raise ArtifactError(f"{path}: is not valid JSON ({error}); rerun the stage that produced the report") from error


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


def model_card(model: Transformer, source: Artifact, metrics: Mapping[str, float], *, adapter_of: str = "") -> str:
    """Return the text of the card, of the adapter alone if ``adapter_of`` names its base.

    It has no times, paths or registry names, so equal models give equal cards.
    """
    shape = model.config
    layout = adapter_for(shape)
    own = isinstance(layout, Lilpipe)
    facts = {
        "Parameters": f"{num_parameters(shape, model.vocab_size):,}",
        "Vocabulary": f"{model.vocab_size:,}, byte-level BPE",
        "Context": f"{shape.max_seq_len:,} tokens",
        "Layers": f"{shape.num_layers}, {shape.hidden_size} wide, feed-forward {shape.intermediate_size}",
        "Heads": f"{shape.num_heads} for queries, {shape.num_kv_heads} for keys and values",
        "Embeddings": "tied" if shape.tie_embeddings else "not tied",
        "Content digest of the checkpoint": f"`{source.content_digest}`",
    }
    rows = [f"| {name} | {value:.6g} |" for name, value in metrics.items()]
    loading = f"{WITHOUT_TRANSFORMERS if own else WITH_TRANSFORMERS}\n\n{WITH_LILPIPE}"
    library = "lilpipe" if own else "transformers"
    origin = read_origin(source.path)
    metadata = card_metadata(origin) | ({"base_model": adapter_of} if adapter_of else {})
    return CARD.format(
        name=f"A language model of {num_parameters(shape, model.vocab_size):,} parameters",
        metadata="".join(f"{key}: {json.dumps(value)}\n" for key, value in metadata.items()),
        lineage=lineage(origin),
        library="peft" if adapter_of else library,
        architecture="this package's own" if own else f"transformers' `{layout.class_name}`",
        loading=WITH_PEFT.replace("BASE", adapter_of) if adapter_of else loading,
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        results="\n".join(["| metric | value |", "| --- | --- |", *rows]) if rows else "It has not been evaluated.",
        stage=source.manifest.stage,
        config=json.dumps(source.manifest.config, indent=2, sort_keys=True, ensure_ascii=False),
    )


STAGE = Stage(
    name="register",
    output="Checkpoint",
    config=RegisterConfig,
    run=run,
    inputs={"model": "Checkpoint"},
    optional_inputs={"report": "Report"},
    main_metric="num_parameters",
)
