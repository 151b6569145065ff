"""Stage ``import_model``: imports a model as an artifact, from a directory, the Hugging Face hub, or a GGUF file.

Weights are copied unchanged, in their files and precision. Before that, the stage checks that the decoder computes the
model exactly and that the tokenizer gives the ids that the model was trained on.
"""

from __future__ import annotations

import shutil

from lilpipe.artifact import Inputs
from lilpipe.config.model import ImportModelConfig
from lilpipe.model.flops import num_parameters
from lilpipe.model.hub import check_model, model_files
from lilpipe.model.model_sources import digests, fetch, write_origin
from lilpipe.stage import Metrics, Stage, Workspace
from lilpipe.tokenizer.encoding import TOKENIZER_FILES


def run(config: ImportModelConfig, inputs: Inputs, workspace: Workspace) -> Metrics:  # noqa: ARG001
    """Check the model and copy it. Raises ``ArtifactError`` for a model that the decoder does not support."""
    source, origin = fetch(config, workspace.scratch)
    shape, vocab_size, tokenizer = check_model(source)
    # A retry starts over, because copying is all the work.
    shutil.rmtree(workspace.output)
    workspace.output.mkdir()
    names = [name for name in model_files(source) if name not in TOKENIZER_FILES]
    for done, name in enumerate(names):
        workspace.progress(done, len(names), "files")
        shutil.copyfile(source / name, workspace.output / name)
    tokenizer.save(workspace.output)
    write_origin(origin, workspace.output)
    for key, value in origin.items():
        workspace.log(f"{key}: {value}")
    check_model(workspace.output)
    return {"num_parameters": float(num_parameters(shape, vocab_size))}


STAGE = Stage(
    name="import_model",
    output="Checkpoint",
    config=ImportModelConfig,
    run=run,
    external=digests,
    main_metric="num_parameters",
)
