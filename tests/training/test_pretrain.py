import json
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from lilpipe.artifact import content_digest, list_files
from lilpipe.config.model import ModelConfig
from lilpipe.config.training import OptimizerConfig, PretrainConfig
from lilpipe.errors import ArtifactError, ConfigError, DataError
from lilpipe.model.hub import load_model
from lilpipe.model.lora import load_adapter
from lilpipe.model.transformer import Transformer
from lilpipe.stage import Workspace, get_stage
from lilpipe.tokens.data_phase_plan import open_loader
from lilpipe.tokens.loader import IGNORED, PretrainLoader, validation_rows
from lilpipe.tokens.shards import TokenShards
from lilpipe.training import pretrain
from lilpipe.training.next_token import NextToken
from tests.alignment.conftest import as_artifact
from tests.model.published import publish
from tests.training.conftest import write_tokens

MODEL = ModelConfig(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=32, max_seq_len=24)


def config(**settings):
    values = {
        "seed": 3,
        "model": MODEL,
        "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
        "num_steps": 40,
        "batch_size": 4,
        "eval_every": 20,
        "validation_rows": 5,
        "checkpoint_every": 10,
    }
    return PretrainConfig.model_validate({**values, **settings})


@pytest.fixture(scope="module")
def trained(tokens, tmp_path_factory):
    workspace = Workspace(tmp_path_factory.mktemp("pretrain"))
    return workspace, pretrain.run(config(), {"tokens": tokens}, workspace)


def digest(workspace):
    return content_digest(list_files(workspace.output))


def test_the_stage_is_known_by_its_name():
    assert get_stage("pretrain").output == "Checkpoint"


def test_training_lowers_bits_per_byte_of_both_sources(trained):
    workspace, metrics = trained
    points = [json.loads(line).get("metrics", {}) for line in workspace.events.read_text().splitlines()]
    for source in ("corpus", "exercises"):
        name = f"validation_bits_per_byte_{source}"
        first, last = (point[name] for point in points if name in point)
        assert metrics[name] == last < first < 8.5


def test_bits_per_byte_are_what_transformers_says_of_the_saved_model(trained, tokens):
    workspace, metrics = trained
    theirs = AutoModelForCausalLM.from_pretrained(workspace.output)
    inputs, targets, num_bytes = validation_rows(TokenShards.open(tokens.path), "corpus", num_rows=5, seq_len=24)
    with torch.no_grad():
        logits = theirs(input_ids=inputs).logits
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    assert metrics["validation_bits_per_byte_corpus"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_metrics_count_tokens_and_parameters(trained):
    _, metrics = trained
    assert metrics["tokens"] == 40 * 4 * 24
    # Embedding; q and o, k and v, three of the MLP, two norms; the last norm.
    assert metrics["num_parameters"] == 264 * 16 + (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32 + 2 * 16) + 16
    assert metrics["train_loss"] < math.log(264)


def test_the_output_is_a_checkpoint_with_its_tokenizer_and_a_report(trained, tokenizer):
    workspace, _ = trained
    _, saved = load_model(workspace.output)
    assert saved.digest == tokenizer.digest
    page = (workspace.report / "report.html").read_text()
    assert "validation bits per byte corpus" in page
    assert "optimizer.learning_rate" in page


def test_a_run_killed_between_and_after_its_steps_ends_in_the_same_bytes(trained, tokens, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def dying(*args, **options):
        raise Killed

    workspace = Workspace(tmp_path)
    batch = PretrainLoader.batch

    with monkeypatch.context() as patch:
        patch.setattr(
            PretrainLoader, "batch", lambda self, step, **o: dying() if step == 17 else batch(self, step, **o)
        )
        with pytest.raises(Killed):
            pretrain.run(config(), {"tokens": tokens}, workspace)
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "export", dying)
        with pytest.raises(Killed):
            pretrain.run(config(), {"tokens": tokens}, workspace)
    pretrain.run(config(), {"tokens": tokens}, workspace)
    assert digest(workspace) == digest(trained[0])


def test_settings_that_cannot_change_the_model_do_not(trained, tokens, tmp_path):
    workspace = Workspace(tmp_path)
    pretrain.run(config(checkpoint_every=7, eval_every=3, log_every=1), {"tokens": tokens}, workspace)
    assert digest(workspace) == digest(trained[0])


@pytest.mark.parametrize(
    "settings", [{"seed": 4}, {"exercise_ratio": 0.25}, {"packing": "best_fit"}, {"stride": 7}], ids=str
)
def test_seed_shares_and_packing_change_the_model(trained, tokens, tmp_path, settings):
    workspace = Workspace(tmp_path)
    pretrain.run(config(**settings), {"tokens": tokens}, workspace)
    assert digest(workspace) != digest(trained[0])


def test_a_run_can_start_from_a_checkpoint(trained, tokens, tmp_path):
    source, before = trained
    checkpoint = as_artifact(source.output, kind="Checkpoint")
    after = pretrain.run(config(), {"tokens": tokens, "model": checkpoint}, Workspace(tmp_path))
    assert after["train_loss"] < before["train_loss"] - 0.1
    other = config(model={**MODEL.model_dump(), "intermediate_size": 48})
    with pytest.raises(ConfigError, match=r"pretrain\.model\.intermediate_size: got 48, expected 32"):
        pretrain.run(other, {"tokens": tokens, "model": checkpoint}, Workspace(tmp_path / "other"))


def with_adapters(trained, **settings):
    """Settings and input of a run that goes on from a checkpoint with adapters."""
    lora = {"r": 2, "use_dora": True, **settings.pop("lora", {})}
    settings = {"num_steps": 6, "checkpoint_every": 2, "log_every": 1, **settings}
    return config(lora=lora, **settings), as_artifact(trained[0].output, kind="Checkpoint", stage="pretrain")


def test_continued_pretraining_trains_adapters(trained, tokens, tmp_path, monkeypatch):
    settings, checkpoint = with_adapters(trained)
    inputs = {"tokens": tokens, "model": checkpoint}
    pretrain.run(settings, inputs, Workspace(tmp_path / "whole"))
    output = tmp_path / "whole" / "output"
    base, written = load_model(checkpoint.path)[0], load_model(output)[0]
    before = base.state_dict()
    differing = {name for name, tensor in written.state_dict().items() if not torch.equal(tensor, before[name])}
    assert differing == {name for name in before if "proj" in name}
    load_adapter(base, output / "adapter")
    some = torch.arange(20)[None]
    torch.testing.assert_close(base(some), written(some), atol=1e-5, rtol=1e-5)
    killed = Workspace(tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr(PretrainLoader, "batch", dying_at(4))
        with pytest.raises(KeyboardInterrupt):
            pretrain.run(settings, inputs, killed)
    pretrain.run(settings, inputs, killed)
    assert digest(killed) == digest(Workspace(tmp_path / "whole"))
    indices = [path.read_text() for path in (killed.scratch / "checkpoints").rglob("*.json")]
    assert any("lora_A" in index for index in indices)
    assert not any("embed_tokens" in index for index in indices)  # frozen


def dying_at(fatal):
    """``PretrainLoader.batch`` that is interrupted at a step."""
    batch = PretrainLoader.batch

    def dying(self, step, **options):
        if step == fatal:
            raise KeyboardInterrupt
        return batch(self, step, **options)

    return dying


def test_adapters_drop_the_same_in_accumulated_batches(trained, tokens, tmp_path):
    found = []
    for parts in (1, 2):
        settings, checkpoint = with_adapters(trained, lora={"lora_dropout": 0.3}, accumulation_steps=parts)
        workspace = Workspace(tmp_path / str(parts))
        pretrain.run(settings, {"tokens": tokens, "model": checkpoint}, workspace)
        events = [json.loads(line) for line in workspace.events.read_text().splitlines()]
        found.append([event["metrics"]["loss"] for event in events if "loss" in event.get("metrics", {})])
    assert len(found[0]) == 6
    assert found[0] == pytest.approx(found[1], abs=2e-6)


def test_adapters_of_initial_weights_are_refused(trained, tokens, tmp_path):
    settings, _ = with_adapters(trained)
    with pytest.raises(ConfigError, match=r"pretrain.lora: got adapters for initial weights, expected a checkpoint"):
        pretrain.run(settings, {"tokens": tokens}, Workspace(tmp_path))


def test_accumulation_gives_the_same_losses(trained, tokens, tmp_path):
    metrics = pretrain.run(config(accumulation_steps=2), {"tokens": tokens}, Workspace(tmp_path))
    assert metrics["train_loss"] == pytest.approx(trained[1]["train_loss"], abs=2e-5)


# --- padding ------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_targets_that_count(tokens):
    """The oracle takes the targets one by one; accumulation and padding must not show."""
    run = config(packing="best_fit", accumulation_steps=2)
    loader = open_loader(run, TokenShards.open(tokens.path))
    model = Transformer(MODEL, 264)
    model.init_weights(0)
    objective = NextToken(run, loader, rank=0, world_size=1, device=torch.device("cpu"))
    for step in range(5):
        batch = loader.batch(step)
        assert 0 < (batch.targets == IGNORED).sum() < batch.targets.numel()
        with torch.no_grad():
            log_probs = model(batch.inputs).float().log_softmax(dim=-1)
        places = [(b, t) for b in range(4) for t in range(24) if batch.targets[b, t] >= 0]
        expected = sum(-log_probs[b, t, batch.targets[b, t]].item() for b, t in places)
        parts = [objective.loss_of_replica(model, step, micro) for micro in range(2)]
        assert sum(part.total.item() for part in parts) == pytest.approx(expected, rel=1e-5)
        assert sum(part.count for part in parts) == len(places)
        assert sum(part.num_tokens for part in parts) == 4 * 24


def test_the_z_loss_is_the_square_of_the_normaliser_and_attention_stays_inside_documents(tokens):
    run = config(z_loss=0.01, intra_document_masking=True, batch_size=2)
    loader = open_loader(run, TokenShards.open(tokens.path))
    model = Transformer(MODEL, 264)
    model.init_weights(0)
    objective = NextToken(run, loader, rank=0, world_size=1, device=torch.device("cpu"))
    found = objective.loss_of_replica(model, 3, 0).total.item()
    batch = loader.batch(3)
    assert (batch.documents > 0).any()
    expected = 0.0
    for tokens_T, targets_T, documents_T in zip(batch.inputs, batch.targets, batch.documents, strict=True):
        for document in documents_T.unique():
            inside = documents_T == document
            with torch.no_grad():
                logits = model(tokens_T[inside][None])[0]
            expected += F.cross_entropy(logits, targets_T[inside], reduction="sum").item()
            expected += 0.01 * logits.logsumexp(-1).square().sum().item()
    assert found == pytest.approx(expected, rel=1e-5)


# --- phases -------------------------------------------------------------------------------------------------------


def test_a_run_of_phases_grows_its_batch_and_its_context_and_is_killed_without_a_trace(tokens, tmp_path, monkeypatch):
    phases = [
        {"from_step": 10, "batch_size": 8, "accumulation_steps": 2},
        {"from_step": 20, "seq_len": 24, "rope_theta": 50_000.0, "exercise_ratio": 0.0},
    ]
    run = config(num_steps=30, seq_len=12, phases=phases, needle={"num_samples": 1, "depths": [0.5]})
    assert run.phase_of(25).rope_theta == 50_000.0
    with pytest.raises(ConfigError, match="needle"):  # 12 tokens have no room for one
        pretrain.run(run, {"tokens": tokens}, Workspace(tmp_path / "needle"))
    run = run.model_copy(update={"needle": None})
    metrics = pretrain.run(run, {"tokens": tokens}, Workspace(tmp_path / "whole"))
    assert metrics["tokens"] == 10 * 4 * 12 + 10 * 8 * 12 + 10 * 4 * 24
    model, _ = load_model(tmp_path / "whole" / "output")
    assert model.config.rope_theta == 50_000.0

    def dying(self, step):
        if step == 23:
            raise KeyboardInterrupt
        return batches(self, step)

    batches = NextToken.batches
    with monkeypatch.context() as patch:
        patch.setattr(NextToken, "batches", dying)
        with pytest.raises(KeyboardInterrupt):
            pretrain.run(run, {"tokens": tokens}, Workspace(tmp_path / "cut"))
    pretrain.run(run, {"tokens": tokens}, Workspace(tmp_path / "cut"))
    assert digest(Workspace(tmp_path / "cut")) == digest(Workspace(tmp_path / "whole"))


def test_what_is_seen_while_it_runs(trained):
    workspace, _ = trained
    events = [json.loads(line) for line in workspace.events.read_text().splitlines()]
    step = next(event["metrics"] for event in events if "loss" in event.get("metrics", {}))
    seen = {"loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory_gib", "data_wait_ratio", "goodput"}
    assert set(step) == seen
    assert 0 < step["mfu"] < 1
    texts = [event for event in events if "text" in event]
    assert [event["done"] for event in texts] == [20, 40]
    assert texts[0]["text"].startswith("The ")
    page = (workspace.report / "report.html").read_text()
    assert "Planned and actual" in page
    assert "Wall time by cause" in page


@pytest.mark.parametrize(
    "options", [{"moe": {"num_experts": 4, "moe_intermediate_size": 8}}, {"mla": {}}, {"dropout": 0.1}]
)
def test_options_of_the_decoder_train_and_are_killed_without_a_trace(tokens, tmp_path, options, monkeypatch):
    run = config(num_steps=12, checkpoint_every=5, model={**MODEL.model_dump(), "num_layers": 2, **options})
    pretrain.run(run, {"tokens": tokens}, Workspace(tmp_path / "whole"))

    def dying(self, step):
        if step == 8:
            raise KeyboardInterrupt
        return batches(self, step)

    batches = NextToken.batches
    with monkeypatch.context() as patch:
        patch.setattr(NextToken, "batches", dying)
        with pytest.raises(KeyboardInterrupt):
            pretrain.run(run, {"tokens": tokens}, Workspace(tmp_path / "cut"))
    pretrain.run(run, {"tokens": tokens}, Workspace(tmp_path / "cut"))
    assert digest(Workspace(tmp_path / "cut")) == digest(Workspace(tmp_path / "whole"))


# --- mixture ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several(tokenizer, tmp_path_factory):
    """A corpus of three streams; the last is too short for a row of validation."""
    texts = {
        "code": {"train": ["for x in y: pass "] * 80, "validation": ["for y in x: pass "] * 9},
        "prose": {"train": ["the cat sat on the mat. "] * 30, "validation": ["the mat sat on the cat. "] * 3},
        "verse": {"train": ["oh cat, oh mat "] * 10, "validation": ["oh"]},
        "exercises": {"train": ["1 2 3 -> 3 2 1\n"] * 60, "validation": ["2 1 3 -> 3 1 2\n"] * 6},
    }
    return write_tokens(tmp_path_factory.mktemp("several"), tokenizer, texts)


def test_streams_give_the_shares_asked_for_up_to_their_limits_and_the_report_says_why_not(several, tmp_path):
    workspace = Workspace(tmp_path)
    mixture = {"weights": {"code": 3, "prose": 1}, "max_epochs": 10, "max_epochs_of": {"code": 1.0}}
    metrics = pretrain.run(config(exercise_ratio=0.25, mixture=mixture), {"tokens": several}, workspace)
    # Of 40 x 4 x 24 tokens the corpus gives 2880, of which 2160 are asked of the 1440 tokens of code.
    assert metrics["epochs_code"] == pytest.approx(1.0, abs=0.02)
    assert metrics["share_code"] == pytest.approx(1440 / 3840, abs=0.01)
    assert metrics["share_prose"] == pytest.approx(1440 / 3840, abs=0.01)
    assert metrics["share_exercises"] == pytest.approx(0.25, abs=0.01)
    assert "share_verse" not in metrics
    page = (workspace.report / "report.html").read_text()
    assert "at its limit of epochs" in page
    # Code at 3 of 4 parts of 3 of 4 parts of the tokens lasts for 1440 / (9 / 16).
    assert "up to 2,560 training tokens" in page
    assert "at its limit of epochs" in workspace.events.read_text()


def test_without_weights_all_streams_are_read_equally_often(several, tmp_path):
    metrics = pretrain.run(config(), {"tokens": several}, Workspace(tmp_path))
    assert metrics["epochs_prose"] == pytest.approx(metrics["epochs_code"], rel=0.05)
    assert metrics["epochs_verse"] == pytest.approx(metrics["epochs_code"], rel=0.1)


def test_bits_per_byte_of_a_corpus_in_streams_is_the_mean_by_bytes_of_validation(several, tmp_path):
    metrics = pretrain.run(config(num_steps=1), {"tokens": several}, Workspace(tmp_path))
    bits = {name: metrics[f"validation_bits_per_byte_{name}"] for name in ("code", "prose")}
    assert "validation_bits_per_byte_verse" not in metrics
    expected = (bits["code"] * 17 * 9 + bits["prose"] * 24 * 3) / (17 * 9 + 24 * 3)
    assert metrics["validation_bits_per_byte_corpus"] == pytest.approx(expected)


def test_weights_of_streams_that_are_not_there_are_an_error(several, tmp_path):
    with pytest.raises(ConfigError, match=r"pretrain\.mixture\.weights: got 'web', expected .*: code, prose, verse"):
        pretrain.run(config(mixture={"weights": {"web": 1}}), {"tokens": several}, Workspace(tmp_path))


# --- bad input ----------------------------------------------------------------------------------------------------


def test_exercises_asked_for_and_not_there_are_an_error_that_names_the_setting(tokenizer, tmp_path):
    texts = {"corpus": {"train": ["some text here"] * 40, "validation": ["other text here"] * 4}}
    tokens = write_tokens(tmp_path / "tokens", tokenizer, texts)
    with pytest.raises(ConfigError, match=r"pretrain.exercise_ratio: got 0.5.*contain only corpus; set it to 0"):
        pretrain.run(config(), {"tokens": tokens}, Workspace(tmp_path / "a"))
    metrics = pretrain.run(config(exercise_ratio=0.0, num_steps=1), {"tokens": tokens}, Workspace(tmp_path / "b"))
    assert "validation_bits_per_byte_corpus" in metrics
    assert "validation_bits_per_byte_exercises" not in metrics


def test_a_corpus_too_small_for_one_batch_is_an_error(tokenizer, tmp_path):
    texts = {"corpus": {"train": ["some text here"] * 3, "validation": ["other text here"] * 4}}
    tokens = write_tokens(tmp_path / "tokens", tokenizer, texts)
    with pytest.raises(DataError, match="one batch"):
        pretrain.run(config(exercise_ratio=0.0), {"tokens": tokens}, Workspace(tmp_path / "a"))


def test_shards_of_another_tokenizer_are_an_error(tokenizer, tmp_path):
    texts = {"corpus": {"train": ["some text here"] * 40, "validation": ["other text here"] * 4}}
    tokens = write_tokens(tmp_path, tokenizer, texts)
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**index, "tokenizer_digest": "0" * 64}))
    with pytest.raises(ArtifactError, match="tokenizer"):
        pretrain.run(config(exercise_ratio=0.0), {"tokens": tokens}, Workspace(tmp_path / "work"))


def test_a_stride_that_would_be_ignored_or_would_skip_tokens_is_refused():
    with pytest.raises(ValueError, match="stride 8 would be ignored by packing best_fit"):
        config(stride=8, packing="best_fit")
    with pytest.raises(ValueError, match=r"stride 25 must be at most seq_len 24"):
        config(stride=25)


def test_a_learning_rate_that_is_far_too_high_is_told_with_its_step(tokens, tmp_path):
    optimizer = OptimizerConfig(learning_rate=1e38, warmup_steps=0)
    with pytest.raises(ConfigError, match=r"step \d+: .*lower optimizer.learning_rate"):
        pretrain.run(config(optimizer=optimizer), {"tokens": tokens}, Workspace(tmp_path))


def test_a_class_of_transformers_goes_on_as_the_decoder_does(trained, tokens, tmp_path, monkeypatch):
    inputs = {"tokens": tokens, "model": as_artifact(trained[0].output, kind="Checkpoint")}
    settings = {"num_steps": 6, "eval_every": 6, "intra_document_masking": True, "sample_prompts": ["The"]}
    found = {}
    for name in ("decoder", "class"):
        found[name] = pretrain.run(config(**settings), inputs, Workspace(tmp_path / name))
        monkeypatch.setattr("lilpipe.model.hub.LAYOUTS", ())
    for metric in ("train_loss", "validation_bits_per_byte_corpus", "num_parameters"):
        assert found["class"][metric] == pytest.approx(found["decoder"][metric], rel=1e-5)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "output") for name in found)
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[name], tensor, atol=1e-3, rtol=0, msg=name)
    longer = config(model=MODEL.model_copy(update={"max_seq_len": 48}))
    with pytest.raises(ConfigError, match=r"pretrain\.seq_len: got 48, expected at most 24 for LlamaForCausalLM"):
        pretrain.run(longer, inputs, Workspace(tmp_path / "long"))


def test_a_class_of_transformers_gets_rows_for_new_tokens(tokens, tokenizer, tmp_path):
    theirs = publish("phi", tmp_path / "phi", tokenizer=tokenizer, vocab_size=tokenizer.vocab_size - 2)
    inputs = {"tokens": tokens, "model": as_artifact(tmp_path / "phi", kind="Checkpoint")}
    settings = {"num_steps": 1, "optimizer": OptimizerConfig(learning_rate=1e-9, warmup_steps=0, weight_decay=0)}
    pretrain.run(config(**settings), inputs, Workspace(tmp_path / "work"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "work" / "output")
    for got, old in (
        (loaded.model.embed_tokens.weight, theirs.model.embed_tokens.weight),
        (loaded.lm_head.weight, theirs.lm_head.weight),
        (loaded.lm_head.bias, theirs.lm_head.bias),
    ):
        torch.testing.assert_close(got[:-2], old)
        torch.testing.assert_close(got[-2:], old.mean(0).expand(2, *old.shape[1:]))
