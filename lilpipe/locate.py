"""Find a checkpoint by directory, step of the pipeline, or registered model."""

from __future__ import annotations

from pathlib import Path

from lilpipe.artifact import MANIFEST, Manifest, read_manifest
from lilpipe.config.lora import ADAPTER_FILES
from lilpipe.config.pipeline import PipelineConfig
from lilpipe.errors import ConfigError
from lilpipe.pipeline.plan import plan
from lilpipe.store import Store

REGISTERED = "models:/"


def locate(model: str | None, config: PipelineConfig, store: Store) -> tuple[str, Path]:
    """Return a name for the model and the directory that contains it; by default the last step with a checkpoint.

    Raises ``ConfigError`` if there is no such model.
    """
    if model is not None and model.startswith(REGISTERED):
        from lilpipe.tracking import registered_files

        return model.removeprefix(REGISTERED), registered_files(model)
    if model is not None and Path(model).is_dir():
        directory = Path(model).resolve()
        return read_manifest(directory).step if (directory / MANIFEST).exists() else directory.name, directory
    planned = plan(config, store)
    made = {name: p.artifact for name, p in planned.items() if p.artifact and _is_whole(p.artifact.manifest)}
    if model is not None and model not in made:
        raise ConfigError(
            f"model {model!r}: there is no such checkpoint; expected a directory, {REGISTERED}NAME@ALIAS, or a step "
            f"with a checkpoint: {', '.join(made) or 'none in this configuration yet; run the pipeline first'}"
        )
    if not made:
        raise ConfigError("model: no checkpoint of this configuration is in the store; run the pipeline first")
    name = model or list(made)[-1]
    return name, store.fetch(made[name]).path


def _is_whole(manifest: Manifest) -> bool:
    """Return whether the artifact is a checkpoint, not the adapter of one alone."""
    return manifest.kind == "Checkpoint" and ADAPTER_FILES[0] not in manifest.files
