import pytest

from lilpipe.errors import ConfigError
from lilpipe.locate import locate
from lilpipe.pipeline.run import run_step
from lilpipe.store import Store
from tests.flows import toys


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        toys.install(patch, tmp_path_factory.mktemp("trouble"))
        yield toys.toy_config()


@pytest.fixture(scope="module")
def ran(config, tmp_path_factory):
    """A store in which the steps up to `sft` have run."""
    store = Store(str(tmp_path_factory.mktemp("store")))
    for step in ("corpus", "pretrain", "sft"):
        run_step(config, step, store=store, pipeline_run="run")
    return store


def test_a_step_is_found_by_its_name_and_the_last_without_one(config, ran):
    name, directory = locate("pretrain", config, ran)
    assert (name, (directory / "model.txt").exists()) == ("pretrain", True)
    assert locate(None, config, ran)[0] == "sft"
    assert locate(str(directory), config, ran) == (name, directory)


def test_what_is_no_checkpoint_is_refused_with_those_there_are(config, ran):
    for model in ("corpus", "register", "nowhere"):
        with pytest.raises(ConfigError, match=f"model '{model}': there is no such checkpoint.*: pretrain, sft$"):
            locate(model, config, ran)


def test_before_any_step_has_run_that_is_said(config, store):
    with pytest.raises(ConfigError, match="no checkpoint of this configuration is in the store"):
        locate(None, config, store)
