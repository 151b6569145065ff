"""A stage that reads the toy's artifact; it takes the place of `tokenizer`."""

from lilpipe.artifact import Inputs, one_input
from lilpipe.config.tokens import TokenizerConfig
from lilpipe.stage import Stage, Workspace


def run(config: TokenizerConfig, inputs: Inputs, workspace: Workspace) -> dict[str, float]:
    prompts = one_input(inputs, "prompts")
    text = (prompts.path / "data").read_text()
    (workspace.output / "read").write_text(text.upper())
    workspace.report.mkdir(parents=True, exist_ok=True)
    (workspace.report / "source").write_text(prompts.manifest.step)
    return {"vocab_size": config.vocab_size}


STAGE = Stage(
    name="tokenizer",
    output="Tokenizer",
    config=TokenizerConfig,
    run=run,
    inputs={"prompts": "Prompts"},
    names_inputs=True,
    main_metric="vocab_size",
)
