"""Recipe ``adapt``: its steps, and what follows from the base."""

import shutil

import pytest
from typer.testing import CliRunner

from lilpipe.cli import app
from lilpipe.config.backend import BackendConfig
from lilpipe.config.pipeline import PipelineConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.model.flops import num_parameters
from lilpipe.model.hub import read_model_config, save_model
from lilpipe.pipeline.base_model import rate
from lilpipe.pipeline.plan import plan, plan_step
from lilpipe.pipeline.run import run_step
from lilpipe.pipeline.wiring import check_wiring
from lilpipe.recipes import load
from lilpipe.store import Store
from tests.model.checkpoints import SMALL, small_model, small_tokenizer
from tests.model.published import publish

CONTINUED = {"enable.corpus": True, "enable.tokens": True, "enable.pretrain": True}
ON = ["import_model", "prompts", "sft", "evaluate", "register", "release"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    save_model(small_model(), small_tokenizer(), directory)
    return directory


def rows(folder):
    """A conversation as the data of the user."""
    (folder / "rows.jsonl").write_text('{"prompt": "Name a tree.", "completion": "Oak."}\n')
    data = str(folder / "rows.jsonl")
    return {"prompts.sources": [data], "corpus.sources": [{"name": "own", "kind": "jsonl", "path": data}]}


def enabled(*names):
    return load("adapt", overrides={f"enable.{name}": True for name in names})


def test_the_short_form_fine_tunes_the_base():
    config = load("adapt")
    assert list(config.steps) == ON
    assert config.steps["sft"].inputs == {"model": "import_model", "prompts": "prompts"}
    assert config.steps["evaluate"].inputs["models"] == ("import_model", "sft")
    assert config.steps["evaluate"].inputs["reference"] == "import_model"  # of a judge
    assert config.evaluate.win_by == "none"
    assert config.steps["release"].inputs == {"model": "sft", "report": "evaluate"}


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("preferences", "dpo"),
        ("grpo",),
        ("benchmarks",),
        ("corpus", "tokens", "pretrain"),
        ("corpus", "tokens", "pretrain", "preferences", "dpo", "grpo", "benchmarks"),
    ],
)
def test_every_choice_of_steps_is_wired(names):
    config = enabled(*names)
    assert set(config.steps) == {*ON, *names}
    for step in config.steps:
        check_wiring(config, step)


def test_rates_fall_with_size_and_rise_with_adapters():
    assert rate("sft", 7e9, lora=False) == 2e-5
    assert rate("sft", 7e9, lora=True) == 2e-4
    assert rate("dpo", 1.75e9, lora=False) == 1e-6
    assert rate("sft", 1e6, lora=True) == 1e-3


def test_rates_and_shape_follow_from_a_local_base(base):
    config = load(
        "adapt", overrides={"import_model.path": str(base), "dpo.lora": {}, "sft.optimizer.learning_rate": 1e-4}
    )
    size = num_parameters(SMALL, small_tokenizer().vocab_size)
    assert config.sft.optimizer.learning_rate == 1e-4
    assert config.dpo.optimizer.learning_rate == rate("dpo", size, lora=True)
    assert config.grpo.optimizer.learning_rate == rate("grpo", size, lora=False)
    assert config.pretrain.model == SMALL
    assert config.pretrain.seq_len == SMALL.max_seq_len


def test_other_recipes_keep_their_rates(base):
    config: PipelineConfig = load("tiny", overrides={"import_model.path": str(base)})
    assert config == load("tiny").model_copy(update={"import_model": config.import_model})


@pytest.fixture
def hidden_base(base, tmp_path, monkeypatch):
    """An imported base whose directory is gone, as that of a hub model or GGUF file never was; and the store."""
    store, directory = Store(str(tmp_path / "store")), tmp_path / "moved"
    shutil.copytree(base, directory)
    monkeypatch.setattr("lilpipe.pipeline.base_model._local_base", lambda _: None)
    config = load("adapt", overrides={"import_model.path": str(directory), **CONTINUED})
    artifact, _ = run_step(config, "import_model", store=store, pipeline_run="run")
    return config, artifact, store


def test_rates_and_shape_follow_from_a_base_once_it_is_imported(hidden_base):
    config, artifact, store = hidden_base
    assert config.sft.optimizer.learning_rate == rate("sft", 1e9, lora=False)
    # The shards of tokens are not read for the plan.
    planned = plan_step(config, store, "pretrain", {"import_model": artifact, "tokens": artifact})
    size = num_parameters(*read_model_config(artifact.path))
    assert planned.config.model == SMALL
    assert planned.config.seq_len == SMALL.max_seq_len
    assert planned.config.optimizer.learning_rate == rate("pretrain", size, lora=False)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sft.parallel.tensor": 2}, r"sft\.parallel\.tensor: got 2, expected 1 for OPTForCausalLM"),
        ({"sft.lora": {"load_in_4bit": True}}, r"sft\.lora\.load_in_4bit: got True, expected False"),
        (CONTINUED | {"pretrain.model.hidden_size": 64}, r"pretrain\.model\.hidden_size: would be ignored"),
    ],
)
def test_what_a_class_of_transformers_cannot_do_is_said_by_the_plan(tmp_path, overrides, message):
    publish("opt", tmp_path / "opt")
    config = load("adapt", overrides={"import_model.path": str(tmp_path / "opt"), **rows(tmp_path), **overrides})
    with pytest.raises(ConfigError, match=message):
        plan(config, Store(str(tmp_path / "store")))


def test_a_division_that_the_base_does_not_allow_is_said_by_the_plan(base, tmp_path):
    overrides = {"import_model.path": str(base), "sft.parallel.tensor": 3, "sft.num_workers": 3, **rows(tmp_path)}
    config = load("adapt", overrides=overrides)
    with pytest.raises(ConfigError, match=r"sft: parallel\.tensor 3 must divide model\.num_heads"):
        plan(config, Store(str(tmp_path / "store")))


def test_a_class_of_transformers_gives_rates_and_the_context(tmp_path):
    publish("opt", tmp_path)
    shape, vocab_size = read_model_config(tmp_path)
    assert isinstance(shape, BackendConfig)
    config = load("adapt", overrides={"import_model.path": str(tmp_path), **CONTINUED})
    assert config.pretrain.seq_len == config.pretrain.model.max_seq_len == shape.max_seq_len
    assert config.sft.optimizer.learning_rate == rate("sft", num_parameters(shape, vocab_size), lora=False)


def test_missing_data_is_said_before_the_base_is_imported(base, tmp_path, monkeypatch):
    monkeypatch.setenv("LILPIPE_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    settings = [f"import_model.path={base}", 'prompts.sources=["nowhere.jsonl"]']
    result = CliRunner().invoke(
        app, ["run", "--no-track", "--recipe", "adapt", *(f"--set={each}" for each in settings)]
    )
    assert isinstance(result.exception, DataError)
    assert f"path nowhere.jsonl does not exist in {tmp_path}" in str(result.exception)
    assert not list(tmp_path.glob("store/import_model/*"))
