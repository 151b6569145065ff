import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from lilpipe.artifact import read_manifest
from lilpipe.cli import app
from lilpipe.config.model import ImportModelConfig
from lilpipe.config.pipeline import PipelineConfig, step
from lilpipe.errors import ArtifactError, ConfigError, DataError
from lilpipe.model import import_model
from lilpipe.model.hub import load_model, save_model
from lilpipe.pipeline.wiring import check_wiring
from lilpipe.stage import Workspace
from lilpipe.tokenizer.chat_template import render
from lilpipe.tokenizer.encoding import Tokenizer
from tests.model.checkpoints import ARCHITECTURES, SMALL, small_model, small_tokenizer
from tests.tokenizer.foreign import write


@pytest.fixture
def directory(tmp_path):
    """Shards in bfloat16, as models are published."""
    save_model(small_model(SMALL.model_copy(update=ARCHITECTURES["GPT-2"])), small_tokenizer(), tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "published", max_shard_size="20KB")
    small_tokenizer().save(tmp_path / "published")
    return tmp_path / "published"


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("LILPIPE_STORE", str(tmp_path / "store"))


def imported(directory):
    result = CliRunner().invoke(app, ["import", str(directory)])
    if result.exception:
        raise result.exception
    state, path = result.output.splitlines()[0].split(": ")
    return state, load_model(path := type(directory)(path)), path


def test_a_model_from_elsewhere_becomes_a_checkpoint_with_the_way_back(directory):
    state, (model, _), path = imported(directory)
    assert state == "imported"
    expected, _ = load_model(directory)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    manifest = read_manifest(path)
    assert manifest.kind == "Checkpoint"
    assert manifest.external.keys() >= {"config.json", "model.safetensors.index.json", "tokenizer.json"}
    assert manifest.files.keys() >= set(manifest.external) - {"vocab.json", "merges.txt"}
    assert imported(directory)[0] == "cached"


def test_stages_that_read_a_checkpoint_take_it(directory):
    steps = {"prompts": step("prompts"), "base": step("import_model", {"path": str(directory)})}
    steps["samples"] = step("rejection_sampling", model="base", prompts="prompts")
    check_wiring(PipelineConfig(recipe="x", steps=steps), "samples")


def test_a_step_that_makes_no_checkpoint_cannot_stand_in_for_one():
    steps = {"prompts": step("prompts"), "samples": step("rejection_sampling", model="prompts", prompts="prompts")}
    with pytest.raises(ConfigError, match="makes a Prompts, expected a Checkpoint"):
        check_wiring(PipelineConfig(recipe="x", steps=steps), "samples")


def test_a_directory_without_a_checkpoint_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(DataError, match=r"import_model\.path: .*nowhere: got no weights"):
        imported(tmp_path / "nowhere")


def test_what_the_decoder_does_not_compute_is_imported_with_its_class(directory, tmp_path):
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text(text.replace('"gelu_new"', '"relu"'))
    workspace = Workspace(tmp_path / "work")
    import_model.run(ImportModelConfig(path=str(directory)), {}, workspace)
    log = (tmp_path / "work" / "events.jsonl").read_text()
    assert (
        "GPT2LMHeadModel of transformers computes this model, not the decoder (activation_function: got 'relu'" in log
    )
    tokens = torch.arange(3, 23)[None]
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ours, _ = load_model(workspace.output)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)


def test_what_neither_the_decoder_nor_its_class_computes_is_not_imported(directory, tmp_path):
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text(text.replace('"gelu_new"', '"foo"'))
    with pytest.raises(ArtifactError, match="activation_function: got 'foo', expected 'gelu_new'"):
        import_model.run(ImportModelConfig(path=str(directory)), {}, Workspace(tmp_path / "work"))


@pytest.mark.parametrize("family", ["llama3", "gemma", "mistral", "qwen"])
def test_a_tokenizer_of_any_kind_is_kept_as_it_came(tmp_path, family):
    source = write(family, tmp_path / "published")
    tokenizer = Tokenizer.load(source)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    save_model(small_model(vocab_size=tokenizer.vocab_size + 6), tokenizer, source)
    assert {name: (source / name).read_bytes() for name in before} == before
    _, (model, loaded), path = imported(source)
    assert {name: (path / name).read_bytes() for name in before} == before
    assert model.vocab_size == tokenizer.vocab_size + 6
    assert loaded.digest == tokenizer.digest
    generation = json.loads((path / "generation_config.json").read_text())
    assert generation["bos_token_id"] == (*tokenizer.document_start_ids, tokenizer.document_end_id)[0]


def test_a_tokenizer_that_is_larger_than_its_model_is_refused(tmp_path):
    source = write("llama2", tmp_path / "published")
    save_model(small_model(vocab_size=600), Tokenizer.load(source), source)
    with pytest.raises(ArtifactError, match=r"vocab_size: got 600, expected at least the 662 of the tokenizer"):
        import_model.run(ImportModelConfig(path=str(source)), {}, Workspace(tmp_path / "work"))


@pytest.mark.parametrize(("family", "spare"), [("llama3", 0), ("llama3", 6), ("gemma", 0), ("mistral", 1)])
def test_chatml_is_added_to_a_base_with_mean_embeddings(tmp_path, family, spare):
    source = write(family, tmp_path / "published")
    tokenizer = Tokenizer.load(source)
    for file in ("chat_template.jinja", "generation_config.json"):
        (source / file).unlink(missing_ok=True)
    model = small_model(SMALL.model_copy(update={"tie_embeddings": False}), vocab_size=tokenizer.vocab_size + spare)
    save_model(model, Tokenizer.load(source), source, dtype=torch.bfloat16)
    expected, before = load_model(source)
    work = Workspace(tmp_path / "work")
    import_model.run(ImportModelConfig(path=str(source), chat_template="chatml"), {}, work)
    found, after = load_model(work.output)
    new = [after.special_ids[name] for name in ("<|im_start|>", "<|im_end|>")]
    assert new == [before.vocab_size, before.vocab_size + 1]
    assert found.vocab_size == before.vocab_size + max(2, spare)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        got, old = found.state_dict()[name], expected.state_dict()[name]
        kept = [row for row in range(len(old)) if row not in new]
        assert torch.equal(got[kept], old[kept])
        mean = old[: before.vocab_size].mean(0)
        torch.testing.assert_close(got[new], mean.expand(2, -1), rtol=0.01, atol=1e-3)  # stored in bfloat16
    ids, mask = render(after, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho <|im_end|>"}])
    assert (
        after.decode([token for token, trained in zip(ids, mask, strict=True) if trained]) == "Ho <|im_end|><|im_end|>"
    )
    assert mask.count(True) > 2
    assert after.turn_end_id == new[1]
    assert new[1] in json.loads((work.output / "generation_config.json").read_text())["eos_token_id"]
    assert (
        AutoTokenizer.from_pretrained(work.output).apply_chat_template(
            [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
        )
        == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_chatml_is_not_for_models_with_our_template(directory, tmp_path):
    with pytest.raises(ConfigError, match="got 'chatml' for a model that lilpipe made"):
        import_model.run(ImportModelConfig(path=str(directory), chat_template="chatml"), {}, Workspace(tmp_path / "w"))
