"""Stage ``release``: the final model as a directory that other tools load, GGUF files, and an upload to the hub.

The directory holds weights in safetensors, the tokenizer with its chat template, ``generation_config.json``, the model
card, the LoRA adapter if the model has one, and ``gguf/`` with one file per type and an Ollama Modelfile. Or it holds
the adapter alone, with tokenizer and card.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from lilpipe.artifact import Artifact, Inputs, one_input, optional_input
from lilpipe.config.lora import ADAPTER_DIRECTORY, ADAPTER_FILES
from lilpipe.config.release import GGUFType, KQuant, ReleaseConfig
from lilpipe.errors import ConfigError
from lilpipe.model.flops import num_parameters
from lilpipe.model.hub import load_model, model_files, save_tensors
from lilpipe.model.origin import copy_origin
from lilpipe.model.register import CARD_FILE, model_card, read_metrics, verify
from lilpipe.model.transformer import Transformer
from lilpipe.release.gguf_file import check_gguf, import_gguf, quantize_gguf, write_gguf
from lilpipe.release.modelfile import find_turns, modelfile
from lilpipe.release.upload import check_access, upload
from lilpipe.stage import Metrics, Stage, Workspace
from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.tokenizer.jinja_template import CHAT_TEMPLATE, JinjaTemplate


def run(config: ReleaseConfig, inputs: Inputs, workspace: Workspace) -> Metrics:
    """Write the release, check that it loads, and upload it if ``config.hub`` names a repository.

    Raises ``ConfigError`` before writing anything for a GGUF file that cannot be written, or a hub without access.
    """
    source, report = one_input(inputs, "model"), optional_input(inputs, "report")
    if config.gguf:
        import_gguf()
        check_gguf(source.path)
    if config.adapter_of:
        _check_adapter(source)
    if config.hub.repo_id:
        check_access(config.hub)
    # A retry starts over.
    shutil.rmtree(workspace.output)
    workspace.output.mkdir()
    model, tokenizer = load_model(source.path)
    write = _write_adapter if config.adapter_of else _write_model
    num_bytes = write(config, source, model, tokenizer, workspace.output)
    metrics = {"num_parameters": float(num_parameters(model.config, model.vocab_size)), "weights_bytes": num_bytes}
    found = {} if report is None else read_metrics(report.path)
    copy_origin(source.path, workspace.output)
    card = model_card(model, source, found, adapter_of=config.adapter_of)
    (workspace.output / CARD_FILE).write_text(card, encoding="utf-8")
    for number, file_type in enumerate(config.gguf):
        workspace.progress(number, len(config.gguf), "GGUF files")
        _write_gguf(workspace, config.name, file_type, tokenizer)
    for path in sorted((workspace.output / "gguf").glob("*.gguf")):
        metrics[f"gguf_bytes/{path.stem.rpartition('-')[2]}"] = float(path.stat().st_size)
    if config.hub.repo_id:
        workspace.log(f"uploaded to {upload(workspace.output, config.hub)}")
    return metrics


def _write_model(
    config: ReleaseConfig, source: Artifact, model: Transformer, tokenizer: Tokenizer, directory: Path
) -> float:
    """Write the weights, rounded in ``model`` too, with the adapter in a folder, and return the size of the files."""
    dtype: torch.dtype = getattr(torch, config.dtype)
    save_tensors(model.config, model.vocab_size, model.state_dict().items(), tokenizer, directory, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    verify(directory, model, tokenizer)
    if (source.path / ADAPTER_DIRECTORY).is_dir():
        shutil.copytree(source.path / ADAPTER_DIRECTORY, directory / ADAPTER_DIRECTORY)
    return float(sum((directory / name).stat().st_size for name in model_files(directory)))


PUBLIC = ("import_model", "pretrain", "register", "release")
"""Stages whose models can be the base of an adapter that is released alone."""


def _check_adapter(source: Artifact) -> None:
    """Raise ``ConfigError`` if the model has no adapter, or one of a model that the pipeline alone has."""
    step, stage = source.manifest.step, source.manifest.stage
    if not (source.path / ADAPTER_DIRECTORY).is_dir():
        raise ConfigError(f"release.adapter_of: step {step} made no adapter; set {stage}.lora, or remove adapter_of")
    for base in source.manifest.inputs.get("model", ()):
        if base.stage not in PUBLIC:
            raise ConfigError(
                f"release.adapter_of: step {step} made an adapter of the model of stage {base.stage}, expected one of "
                f"an imported base; let step {step} continue the adapter of the step before it (inputs.adapter), or "
                "remove adapter_of"
            )


def _write_adapter(
    config: ReleaseConfig,
    source: Artifact,
    model: Transformer,  # noqa: ARG001
    tokenizer: Tokenizer,
    directory: Path,
) -> float:
    """Write the adapter with the name of its base, and return the size of its files."""
    settings, weights = (directory / name for name in ADAPTER_FILES)
    stated = json.loads((source.path / ADAPTER_DIRECTORY / settings.name).read_text(encoding="utf-8"))
    stated["base_model_name_or_path"] = config.adapter_of
    settings.write_text(json.dumps(stated, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shutil.copyfile(source.path / ADAPTER_DIRECTORY / weights.name, weights)
    tokenizer.save(directory)
    return float(settings.stat().st_size + weights.stat().st_size)


def _write_gguf(workspace: Workspace, name: str, file_type: GGUFType | KQuant, tokenizer: Tokenizer) -> None:
    """Write one GGUF file, and the Modelfile with the first."""
    directory = workspace.output / "gguf"
    directory.mkdir(exist_ok=True)
    path = directory / f"{name}-{file_type}.gguf"
    if file_type in ("Q4_K_M", "Q5_K_M", "Q6_K"):
        unquantized = workspace.scratch / "f16.gguf"
        write_gguf(workspace.output, unquantized, "F16", name=name)
        quantize_gguf(unquantized, path, file_type)
        unquantized.unlink()
    else:
        write_gguf(workspace.output, path, file_type, name=name)
    if not (directory / "Modelfile").exists():
        template = chat_template_of(tokenizer)
        turns = template and find_turns(template.text)
        stops = [tokenizer.document_end] if template is None else _ends(tokenizer)
        (directory / "Modelfile").write_text(modelfile(path.name, turns or None, stops), encoding="utf-8")


def chat_template_of(tokenizer: Tokenizer) -> JinjaTemplate | None:
    """Return the tokenizer's chat template, or ``None`` if it has none."""
    if tokenizer.template is not None:
        return tokenizer.template
    return JinjaTemplate(CHAT_TEMPLATE, {}) if tokenizer.has_turns else None


def _ends(tokenizer: Tokenizer) -> list[str]:
    """Return the names of the tokens that end a turn or a document."""
    return list(dict.fromkeys([tokenizer.decode([tokenizer.turn_end_id]), tokenizer.document_end]))


STAGE = Stage(
    name="release",
    output="Checkpoint",
    config=ReleaseConfig,
    run=run,
    inputs={"model": "Checkpoint"},
    optional_inputs={"report": "Report"},
    main_metric="num_parameters",
)
