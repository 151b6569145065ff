"""The objective of fine-tuning, packed and not, against transformers' loss."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lilpipe.config.model import ModelConfig
from lilpipe.model.hub import save_model
from lilpipe.model.neftune import EmbeddingNoise
from lilpipe.model.transformer import Transformer
from lilpipe.training.conversation_encoding import EncodedConversation
from lilpipe.training.supervised import SupervisedTokens, collate
from tests.model.checkpoints import small_model, small_tokenizer
from tests.model.options import of_family

VOCAB_SIZE = 270
LLAMA = ModelConfig(hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=32, max_seq_len=32)
GPT2 = LLAMA.model_copy(update={**of_family("gpt2"), "num_kv_heads": 2})
LENGTHS = [(3, 4), (9, 2), (2, 12), (5, 5), (14, 3), (2, 2), (4, 9), (7, 6)]


def examples(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    return [
        EncodedConversation(
            str(number),
            torch.randint(VOCAB_SIZE, (prompt + answer,), generator=generator).tolist(),
            [False] * prompt + [True] * answer,
        )
        for number, (prompt, answer) in enumerate(lengths)
    ]


def objective(items, **options):
    return SupervisedTokens(items, **{"batch_size": len(items), "seed": 0, "padding_id": 0, **options})


def loss_and_gradients(model, objective, step=0):
    """Of all micro-batches of a step."""
    model.zero_grad()
    total, count, tokens = 0.0, 0, 0
    for batch in objective.batches(step):
        scores = model(
            batch.inputs, targets_BT=batch.targets, documents_BT=batch.documents, positions_BT=batch.positions
        )
        loss = objective.loss(scores, batch)
        loss.total.backward()
        total, count, tokens = total + loss.total.item(), count + loss.count, tokens + loss.num_tokens
    return total, count, tokens, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_the_loss_is_transformers_loss_with_prompt_and_padding_labelled_out(tmp_path):
    model = small_model()
    save_model(model, small_tokenizer(), tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    total, count, _, gradients = loss_and_gradients(model, objective(examples()))
    wide = max(len(item.ids) for item in examples())
    ids, labels, attention = torch.zeros(3, len(LENGTHS), wide, dtype=torch.long)
    labels[:] = -100
    for row, item in enumerate(examples()):
        ids[row, : len(item.ids)] = torch.tensor(item.ids)
        labels[row, : len(item.ids)] = torch.tensor(item.ids).where(torch.tensor(item.mask), -100)
        attention[row, : len(item.ids)] = 1
    expected = theirs(input_ids=ids, attention_mask=attention, labels=labels).loss
    expected.backward()
    assert count == sum(answer for _, answer in LENGTHS)
    assert total / count == pytest.approx(expected.item(), abs=1e-5)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(gradients[name] / count, parameter.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [LLAMA, GPT2], ids=["Llama", "GPT-2"])
def test_packed_micro_batches_give_the_loss_and_the_gradients_of_single_rows(shape):
    model = Transformer(shape, VOCAB_SIZE)
    model.init_weights(0)
    model = model.double()
    plain = loss_and_gradients(model, objective(examples(), packing=False))
    for options in ({}, {"accumulation_steps": 2}):
        packed = objective(examples(), **options)
        assert sum(len(batch.inputs) for batch in packed.batches(0)) < len(LENGTHS)
        found = loss_and_gradients(model, packed)
        assert found[:3] == (pytest.approx(plain[0], rel=1e-12), *plain[1:3])
        for name, gradient in plain[3].items():
            torch.testing.assert_close(found[3][name], gradient, atol=1e-12, rtol=1e-12)


def test_a_conversation_in_a_row_does_not_see_the_one_before_it():
    model = Transformer(LLAMA, VOCAB_SIZE)
    model.init_weights(0)
    (batch,) = objective(examples([(4, 3), (4, 4), (8, 10)])).batches(0)
    assert batch.documents is not None
    changed = batch.inputs.clone()
    changed[batch.documents == 0] = 7
    before, after = (model(x, documents_BT=batch.documents) for x in (batch.inputs, changed))
    assert torch.equal(before[batch.documents > 0], after[batch.documents > 0])


def test_the_parts_of_all_ranks_add_up_to_the_step():
    model = Transformer(LLAMA, VOCAB_SIZE)
    model.init_weights(0)
    model = model.double()
    whole = loss_and_gradients(model, objective(examples()))
    parts = [loss_and_gradients(model, objective(examples(), rank=rank, world_size=2)) for rank in range(2)]
    assert sum(part[0] for part in parts) == pytest.approx(whole[0], rel=1e-12)
    assert sum(part[2] for part in parts) == whole[2] == sum(map(sum, LENGTHS))


def test_rows_hold_whole_conversations_padded_on_the_right_with_targets_shifted():
    first = (torch.tensor([1, 2, 3]), torch.tensor([-100, 3, 4]))
    second = (torch.tensor([5]), torch.tensor([6]))
    batch = collate([[first, second], [second]], padding_id=9)
    assert batch.inputs.tolist() == [[1, 2, 3, 5], [5, 9, 9, 9]]
    assert batch.targets.tolist() == [[-100, 3, 4, 6], [6, -100, -100, -100]]
    assert batch.documents is not None
    assert batch.documents.tolist() == [[0, 0, 0, 1], [0, -1, -1, -1]]
    assert batch.positions is not None
    assert batch.positions.tolist() == [[0, 1, 2, 0], [0, 0, 0, 0]]


def test_each_epoch_shows_each_conversation_once_in_an_order_of_its_own():
    items = [EncodedConversation(str(number), [number, 100 + number, 7], [False, True, True]) for number in range(20)]
    source = objective(items, batch_size=5, packing=False)
    seen = [source.batches(step)[0].inputs[:, 0].tolist() for step in range(8)]
    epochs = [[number for numbers in part for number in numbers] for part in (seen[:4], seen[4:])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
    assert epochs[0] != epochs[1]
    assert source.batches(3)[0].inputs[:, 0].tolist() == seen[3]


def test_nothing_but_what_is_supervised_counts():
    item = EncodedConversation("a", [1, 2, 3, 4, 5], [False, True, False, True, True])
    (batch,) = objective([item]).batches(0)
    assert batch.inputs.tolist() == [[1, 2, 3, 4]]
    assert batch.targets.tolist() == [[2, -100, 4, 5]]


# --- noise --------------------------------------------------------------------------------------------------------


def noise_of(model, *, alpha, step=0, **options):
    """What is added to the embeddings of each conversation, by its number in the step."""
    noise, layouts, found = EmbeddingNoise(alpha=alpha, seed=3), [], {}

    def watch(step, batches):
        layouts.extend(batches)
        noise.expect(step, batches)

    for batch, layout in zip(objective(examples(), watch=watch, **options).batches(step), layouts, strict=True):
        plain = torch.zeros(*batch.inputs.shape, LLAMA.hidden_size)
        added = noise._add(model.model.embed_tokens, (batch.inputs,), plain)
        for row, places in enumerate(layout):
            start = 0
            for number, length in places:
                found[number] = added[row, start : start + length]
                start += length
            assert not added[row, start:].any()
    return found


def test_noise_lies_within_its_bound_and_is_that_of_the_step_however_it_is_laid_out():
    model = Transformer(LLAMA, VOCAB_SIZE)
    model.init_weights(0)
    packed = noise_of(model, alpha=5.0)
    assert len(packed) == len(LENGTHS)
    for added in packed.values():
        bound = 5.0 / (added.numel() ** 0.5)
        assert 0.8 * bound < added.abs().max() <= bound
    for options in ({"packing": False}, {"accumulation_steps": 2}):
        same = noise_of(model, alpha=5.0, **options)
        assert all(torch.equal(same[number], added) for number, added in packed.items())
    other = noise_of(model, alpha=5.0, step=1)
    assert not any(torch.equal(other[number], added) for number, added in packed.items() if number in other)


def test_workers_that_have_parts_of_the_rows_add_parts_of_the_same_noise():
    tokens, plain = torch.ones(2, 12, dtype=torch.long), torch.zeros(2, 12, 16)

    def added(embedded, part):
        noise = EmbeddingNoise(alpha=5.0, seed=0, part=part)
        noise.expect(3, [[[(1, 4), (0, 5)], [(2, 7)]]])
        return noise._add(torch.nn.Identity(), (tokens,), embedded)

    whole = added(plain, 0)
    assert whole[0, :9].all()
    assert not whole[0, 9:].any()
    assert torch.equal(torch.cat([added(plain[:, :4], part) for part in range(3)], dim=1), whole)


def test_noise_is_added_in_training_alone():
    model = Transformer(LLAMA, VOCAB_SIZE)
    model.init_weights(0)
    plain = model.eval()(torch.ones(1, 4, dtype=torch.long))
    noise = EmbeddingNoise(alpha=5.0, seed=0)
    noise.install(model)
    assert torch.equal(model(torch.ones(1, 4, dtype=torch.long)), plain)
    noise.expect(0, [[[(0, 4)]]])
    assert not torch.equal(model.train()(torch.ones(1, 4, dtype=torch.long)), plain)
