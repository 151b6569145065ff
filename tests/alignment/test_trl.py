"""Losses and gradients against TRL 1.16, whose methods used here are private: pyproject.toml pins the version."""

import datasets
import pytest
import torch

from lilpipe.alignment.dpo import EncodedPair, dpo_loss, dpo_margin, pair_logprobs
from lilpipe.config import ModelConfig
from lilpipe.model.transformer import Transformer

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")

VOCAB_SIZE, PADDING = 32, 0
CONFIG = ModelConfig(hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=32, max_seq_len=32)
BETA = 0.3

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def our_model(seed):
    model = Transformer(CONFIG, VOCAB_SIZE)
    model.init_weights(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(8)  # far from uniform, so that a wrong mask or shift shows
    return model


def their_model(ours):
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=CONFIG.hidden_size,
        num_hidden_layers=CONFIG.num_layers,
        num_attention_heads=CONFIG.num_heads,
        num_key_value_heads=CONFIG.num_kv_heads,
        intermediate_size=CONFIG.intermediate_size,
        max_position_embeddings=CONFIG.max_seq_len,
        rms_norm_eps=CONFIG.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": CONFIG.rope_theta},
        tie_word_embeddings=True,
        pad_token_id=PADDING,
    )
    model = transformers.LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(ours.state_dict(), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    return model


@pytest.fixture(scope="module")
def word_tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = {"<pad>": 0, "<eos>": 1, **{f"w{index}": index for index in range(2, VOCAB_SIZE)}}
    backend = Tokenizer(WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def settings(tmp_path, **values):
    return {"output_dir": str(tmp_path), "use_cpu": True, "report_to": [], "bf16": False, **values}


def assert_same_gradients(ours, theirs, *, tolerance=1e-6):
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - expected[name].grad).abs().max() < tolerance, name


@pytest.mark.parametrize("nll", [0.0, 0.2])
def test_the_dpo_loss_and_its_gradient_are_trls(tmp_path, word_tokenizer, nll):
    # Chosen answers of one length: TRL averages the likelihood over tokens, we over pairs.
    pairs = [EncodedPair([2, 3], [4, 5, 6], [7, 1]), EncodedPair([8], [9, 10, 1], [11, 12, 13, 14, 1])]
    ours, reference = our_model(0), our_model(1)
    data = [{"prompt": "w2", "chosen": "w3", "rejected": "w4"}]
    trainer = trl.DPOTrainer(
        model=their_model(ours),
        ref_model=their_model(reference),
        args=trl.DPOConfig(
            **settings(tmp_path, beta=BETA, loss_type=["sigmoid", "sft"], loss_weights=[1.0, nll], max_length=None)
        ),
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=word_tokenizer,
    )
    trainer.model.eval()
    batch = trainer.data_collator(
        [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in pairs]
    )
    expected = trainer._compute_loss(trainer.model, batch, False)
    expected.backward()

    policy, _ = pair_logprobs(ours, pairs, padding_id=PADDING, mask_formatting_tokens=False)
    with torch.no_grad():
        fixed, _ = pair_logprobs(reference, pairs, padding_id=PADDING, mask_formatting_tokens=False)
    loss = dpo_loss(dpo_margin(policy, fixed.chosen_N, fixed.rejected_N), beta=BETA) - nll * policy.chosen_mean_N
    loss.mean().backward()
    assert loss.mean().item() == pytest.approx(expected.item(), abs=1e-6)
    assert_same_gradients(ours, trainer.model)
