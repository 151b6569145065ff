"""One adapter that is trained by SFT, then by DPO, and released, against peft on the imported base."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from lilpipe.artifact import Artifact
from lilpipe.errors import ConfigError
from lilpipe.model.hub import save_model
from lilpipe.pipeline.plan import plan
from lilpipe.pipeline.run import run_step
from lilpipe.recipes import load
from lilpipe.release.release import STAGE
from lilpipe.stage import Workspace
from lilpipe.store import Store
from tests.model.checkpoints import small_model, small_tokenizer

peft = pytest.importorskip("peft")

LORA = {"r": 3, "target_modules": ["q_proj", "down_proj"]}
TOKENS = torch.arange(40).view(2, 20) * 5 % 200


def configured(base, rows, **overrides):
    """The steps from the import to the release, with one adapter in the middle."""
    training = {"lora": LORA, "num_workers": 1, "batch_size": 4, "optimizer.learning_rate": 1e-2}
    settings = {f"{stage}.{name}": value for stage in ("sft", "dpo") for name, value in training.items()}
    enabled = {"preferences": True, "dpo": True, "evaluate": False, "register": False}
    on = {f"enable.{name}": value for name, value in enabled.items()}
    wiring = {"steps.dpo.inputs.model": "import_model", "steps.dpo.inputs.adapter": "sft"}
    sources = {"import_model.path": str(base), "prompts.sources": [str(rows)], "preferences.num_workers": 1}
    changes = {"release.dtype": "float32", **settings, **on, **wiring, **sources, **overrides}
    return load("adapt", overrides=changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    save_model(small_model(), small_tokenizer(), directory)
    return directory


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    pairs = [{"prompt": f"Is {i} odd?", "chosen": f"{i % 2}", "rejected": f"no {i}"} for i in range(40)]
    texts = [{"prompt": f"Say {i}.", "completion": f"It is {i}."} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*pairs, *texts]))
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store whose steps run in this process, which saves the time of starting others."""

    def launch(stage, section, inputs, work, **_):
        return stage.run(section, inputs, Workspace(work))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lilpipe.pipeline.run.launch", launch)
        yield Store(str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def artifacts(base, rows, store):
    """The artifacts by step."""
    config = configured(base, rows)
    made = {name: run_step(config, name, store=store, pipeline_run="run")[0] for name in config.steps}
    alone = configured(base, rows, **{"release.adapter_of": str(base)})
    return made | {"alone": run_step(alone, "release", store=store, pipeline_run="alone")[0]}


def logits(directory):
    return AutoModelForCausalLM.from_pretrained(directory)(TOKENS).logits


def test_peft_computes_each_steps_model_from_the_base_and_its_adapter(base, artifacts):
    found = {}
    for step in ("sft", "dpo", "release"):
        plain = AutoModelForCausalLM.from_pretrained(base)
        adapted = peft.PeftModel.from_pretrained(plain, artifacts[step].path / "adapter")
        found[step] = adapted(TOKENS).logits
        torch.testing.assert_close(found[step], logits(artifacts[step].path), atol=1e-4, rtol=1e-4)
    assert torch.equal(found["release"], found["dpo"])
    differences = [(found[a] - found[b]).abs().max() for a, b in (("sft", "dpo"),)]
    differences.append((found["sft"] - logits(base)).abs().max())
    assert min(differences) > 0.1


def test_an_adapter_alone_names_its_base_and_loads_on_it(base, artifacts):
    directory = artifacts["alone"].path
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(directory)
    torch.testing.assert_close(loaded(TOKENS).logits, logits(artifacts["dpo"].path), atol=1e-4, rtol=1e-4)
    assert not list(directory.glob("model*"))
    assert (directory / "tokenizer.json").exists()
    assert f'base_model: "{base}"' in (directory / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dpo.lora.path": "mine"}, r"steps.dpo.inputs.adapter: got also lora.path mine"),
        ({"dpo.lora": None}, r"steps.dpo.inputs.adapter: got no lora"),
        ({"steps.dpo.inputs.adapter": "import_model"}, "step import_model made no adapter, expected a step with lora"),
        ({"steps.dpo.inputs.model": "sft"}, "step sft made an adapter of another checkpoint than inputs.model"),
    ],
)
def test_an_adapter_that_cannot_be_continued_is_refused_in_the_plan(base, rows, store, artifacts, changes, message):
    with pytest.raises(ConfigError, match=message):
        plan(configured(base, rows, **changes), store)


def test_an_adapter_of_a_model_that_only_the_pipeline_has_is_not_released_alone(base, rows, store, artifacts, tmp_path):
    section = configured(base, rows, **{"release.adapter_of": "mine/base"}).release
    (entry,) = artifacts["dpo"].manifest.inputs["model"]
    of_sft = {"model": [entry.model_copy(update={"stage": "sft"})]}
    for manifest, message in (
        (artifacts["dpo"].manifest.model_copy(update={"inputs": of_sft}), "an adapter of the model of stage sft"),
        (artifacts["import_model"].manifest, "step import_model made no adapter"),
    ):
        path = artifacts[manifest.step].path
        with pytest.raises(ConfigError, match=f"release.adapter_of: .*{message}"):
            STAGE.run(section, {"model": Artifact(str(path), path, manifest)}, Workspace(tmp_path))
