"""Memory by formula against what torch saves and allocates."""

import json
import os
import subprocess
import sys

import pytest
import torch

from lilpipe.config.lora import LoRAConfig
from lilpipe.config.model import ModelConfig
from lilpipe.config.parallel import ParallelConfig
from lilpipe.config.phases import PhaseConfig
from lilpipe.config.training import OptimizerConfig, PretrainConfig
from lilpipe.model.flops import num_parameters
from lilpipe.model.lora import add_adapters
from lilpipe.model.transformer import Transformer
from lilpipe.training import activation_checkpointing
from lilpipe.training.memory import STANDING, activation_bytes, peak_memory
from tests.model.options import of_family
from tests.training import memory_of_layouts
from tests.training.memory_of_layouts import peak_bytes

VOCAB = 200
NUM_TOKENS = 2 * 64
SMALL = ModelConfig(hidden_size=64, num_layers=4, num_heads=4, num_kv_heads=2, intermediate_size=176, max_seq_len=64)
MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
}
MLA = {"q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 12}


def changed(**changes):
    return ModelConfig.model_validate({**SMALL.model_dump(), **changes})


def filled(config, vocab_size=VOCAB):
    model = Transformer(config, vocab_size)
    model.init_weights(0)
    model.set_dropout_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def step(model, **inputs):
    tokens_BT = torch.arange(NUM_TOKENS).view(2, 64) % VOCAB
    model(tokens_BT, targets_BT=tokens_BT, **inputs).logprobs.sum().backward()


def saved_bytes(model, **inputs):
    """Bytes of all that one forward pass saves, each storage once, weights and tables left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tokens_BT = torch.arange(NUM_TOKENS).view(2, 64) % VOCAB
        kept = model(tokens_BT, targets_BT=tokens_BT, **inputs)  # noqa: F841 (else its storages would be used again)
    return sum(found.values())


SHAPES = {
    "grouped heads": SMALL,
    "a head of keys for each of queries": changed(num_kv_heads=4),
    "a wide feed-forward layer": changed(intermediate_size=400),
    "long and narrow": changed(hidden_size=32, num_layers=9),
    "norms of queries and keys": changed(qk_norm=True),
    "dropout": changed(dropout=0.1),
    "gpt2": changed(**of_family("gpt2"), num_kv_heads=4),
    "norms before and after": changed(**of_family("gemma2"), head_dim=40),
    "a norm over all heads": changed(qk_norm="projection", norm_placement="post"),
    "parallel residual": changed(**of_family("gpt_neox"), num_kv_heads=4),
    "experts": changed(moe=MOE),
    "experts, none shared": changed(moe={**MOE, "n_shared_experts": 0, "num_experts_per_tok": 3}),
    "latent attention": changed(mla=MLA),
    "queries straight from the stream": changed(mla={**MLA, "q_lora_rank": None, "v_head_dim": 20}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_block_saves_what_the_formula_says(name):
    config = SHAPES[name]
    # Of two depths, so that what stands outside the blocks falls out.
    deeper = config.model_copy(update={"num_layers": config.num_layers + 1})
    block = saved_bytes(filled(deeper)) - saved_bytes(filled(config))
    assert block / NUM_TOKENS == pytest.approx(activation_bytes(config, config.num_layers), rel=0.05)


def test_on_a_cpu_each_block_keeps_the_mask_of_documents_as_floats():
    documents_BT = torch.zeros(2, 64, dtype=torch.int64)
    deeper = filled(SMALL.model_copy(update={"num_layers": 5}))
    block = saved_bytes(deeper, documents_BT=documents_BT) - saved_bytes(filled(SMALL), documents_BT=documents_BT)
    config = PretrainConfig(model=SMALL, batch_size=2, intra_document_masking=True)
    planned = {term.name: term.bytes for term in peak_memory(config, VOCAB, on_cpu=True)}
    assert block == pytest.approx(planned["activations"] / SMALL.num_layers, rel=0.05)


def test_on_a_cpu_each_block_keeps_capped_scores():
    capped = changed(attn_logit_softcap=5.0)
    deeper = capped.model_copy(update={"num_layers": capped.num_layers + 1})
    block = saved_bytes(filled(deeper)) - saved_bytes(filled(capped))
    config = PretrainConfig(model=capped, batch_size=2)
    planned = {term.name: term.bytes for term in peak_memory(config, VOCAB, on_cpu=True)}
    assert block == pytest.approx(planned["activations"] / capped.num_layers, rel=0.05)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("model", "vocab_size"), [(SMALL, VOCAB), (changed(num_layers=2), 4_000), (changed(num_layers=8, moe=MOE), VOCAB)]
)
def test_a_step_takes_what_the_plan_says(model, vocab_size, mode, tmp_path):
    config = PretrainConfig(model=model, batch_size=2, activation_checkpointing=mode)
    planned = sum(term.bytes for term in peak_memory(config, vocab_size, on_cpu=True) if term.name not in STANDING)
    built = filled(model, vocab_size)
    activation_checkpointing.apply(built, mode)
    step(built)
    measured = peak_bytes(lambda: step(built), tmp_path / "trace.json")
    assert measured == pytest.approx(planned, rel=0.15)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """What two workers measured in each layout."""
    root = tmp_path_factory.mktemp("layouts")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "tests.training.memory_of_layouts", str(root)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((root / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.distributed
@pytest.mark.parametrize("name", memory_of_layouts.LAYOUTS)
def test_the_fullest_worker_of_a_layout_takes_what_the_plan_says(layouts, name):
    planned = peak_memory(memory_of_layouts.config(name), memory_of_layouts.VOCAB, on_cpu=True)
    of_step = sum(term.bytes for term in planned if term.name not in ("weights", "optimizer state"))
    assert max(worker[name]["peak"] for worker in layouts) == pytest.approx(of_step, rel=0.15)
    weights = next(term.bytes for term in planned if term.name == "weights")
    assert max(worker[name]["weights"] for worker in layouts) == pytest.approx(weights, rel=0.01)


# --- sharding and the rest, by hand ---------------------------------------------------------------------------------


def terms(vocab_size=VOCAB, **settings):
    return {term.name: term.bytes for term in peak_memory(PretrainConfig(**settings), vocab_size)}


def test_sharding_divides_weights_gradients_and_optimizer_state():
    whole, parts = terms(model=SMALL), terms(model=SMALL, num_workers=4, parallel=ParallelConfig(shard=4))
    for name in ("weights", "gradients", "optimizer state"):
        assert parts[name] == whole[name] / 4
    assert whole["weights"] == 4 * num_parameters(SMALL, VOCAB)
    assert whole["optimizer state"] == 2 * whole["weights"]


def test_muon_keeps_one_moment_of_the_blocks_matrices():
    adamw, muon = terms(model=SMALL), terms(model=SMALL, optimizer=OptimizerConfig(kind="muon"))
    matrices = SMALL.num_layers * 64 * (2 * 64 + 2 * 32 + 3 * 176)
    assert adamw["optimizer state"] - muon["optimizer state"] == 4 * matrices


@pytest.mark.parametrize("lora", [LoRAConfig(r=3), LoRAConfig(use_dora=True, target_modules=("q_proj", "down_proj"))])
def test_with_adapters_only_they_have_gradients_and_optimizer_state(lora):
    model = filled(SMALL)
    add_adapters(model, lora, seed=0, stage="pretrain")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    planned = terms(model=SMALL, lora=lora)
    assert planned["weights"] == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert planned["gradients"] == 4 * trained
    assert planned["optimizer state"] == 8 * trained
    sharded = terms(model=SMALL, lora=lora, num_workers=2, parallel=ParallelConfig(shard=2))
    assert sharded["weights"] == planned["weights"] / 2


def test_replicas_that_do_not_shard_hold_everything_whole():
    assert terms(model=SMALL, num_workers=4, batch_size=16) == terms(model=SMALL, batch_size=4)


def test_a_phase_of_longer_sequences_sets_the_peak():
    plain = {"model": SMALL, "num_steps": 10, "seq_len": 16}
    raised = terms(**plain, phases=(PhaseConfig(from_step=5, seq_len=64),))
    assert raised == terms(**(plain | {"seq_len": 64}))


def test_checkpointing_saves_less_the_more_it_computes_again():
    kept = {mode: terms(model=SMALL, activation_checkpointing=mode) for mode in ("none", "selective", "full")}
    activations = [kept[mode]["activations"] for mode in ("none", "selective", "full")]
    assert activations == sorted(activations, reverse=True)
    assert activations[2] == SMALL.num_layers * 16 * 64 * 64 * 4  # the input of each block


def test_accumulation_takes_fewer_rows_at_once():
    once, four = terms(model=SMALL), terms(model=SMALL, accumulation_steps=4)
    assert four["activations"] == once["activations"] / 4


def test_the_first_worker_of_a_pipeline_holds_as_many_micro_batches_as_there_are_stages():
    settings = {"model": SMALL, "batch_size": 16, "accumulation_steps": 8}
    pipeline = {"num_workers": 4, "parallel": ParallelConfig(pipeline=4)}
    # Four micro-batches of a quarter of the layers: as much as one of all the layers.
    assert terms(**settings, **pipeline)["activations"] == terms(**settings)["activations"]
    # Interleaved, two stages of one block each: 2 + 2 passes to warm up and the one that follows.
    interleaved = ParallelConfig(pipeline=2, stages_per_worker=2, schedule="interleaved")
    found = terms(**settings, num_workers=2, parallel=interleaved)["activations"]
    assert found == terms(**settings)["activations"] * 5 / 4


def test_logits_of_a_large_vocabulary_are_bounded():
    for vocab_size, at_once in ((10_000, 2**25), (100_000, 2048 * 100_000)):
        logits = terms(vocab_size, model=SMALL, batch_size=512)["logits"]
        # A part of the exponentials and its gradient, and the gradient of the output layer's matrix.
        assert logits - 4 * 64 * vocab_size == pytest.approx(2 * 4 * at_once, rel=0.01)
