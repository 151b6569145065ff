"""The data of a run with phases: a loader from configuration and shards."""

import hashlib
from collections import Counter, defaultdict
from itertools import chain

import numpy as np
import pytest
import torch

from lilpipe.config.model import ModelConfig
from lilpipe.config.training import PretrainConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.tokens.data_phase_plan import open_loader, plan_data_phases
from lilpipe.tokens.trace import Sighting, documents_of, trace_document, trace_row

MODEL = ModelConfig(hidden_size=8, num_layers=1, num_heads=1, num_kv_heads=1, intermediate_size=8, max_seq_len=32)
RAMP = ({"from_step": 10, "batch_size": 8}, {"from_step": 25, "batch_size": 16})


def config(*phases, **settings):
    values = {"seed": 5, "model": MODEL, "seq_len": 16, "num_steps": 40, "batch_size": 4, "exercise_ratio": 0.3}
    return PretrainConfig.model_validate({**values, "phases": phases, **settings})


def rows(loader, *steps):
    """Stream, epoch and number of each row of some steps, in order."""
    names = list(loader.streams)
    return [
        (names[stream], epoch, number)
        for step in steps
        for stream, epoch, number in zip(*(column.tolist() for column in loader.rows(step)), strict=True)
    ]


# --- without phases -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "digest"),
    [
        ({}, "e0a6bec6fad773bb270686ae19c03b0dcab1f0633eca440f73c9bf215972eece"),
        ({"stride": 5}, "830c6923e1f604ca90588d2804f1b0a4380447d42da1d687316987a4e74ec8f0"),
        ({"packing": "best_fit"}, "4fe5a3b085fb8e2ba72cc677446b292aa56d0c37af19440803ac06ff203f10b3"),
        ({"exercise_ratio": 0.0}, "0212ba42fe4c85fe0a2b6908c829bc4db264c8ac34b25e8dba070e2576f88a41"),
    ],
    ids=str,
)
def test_a_run_without_phases_has_the_batches_that_it_had_before_there_were_phases(built_by_source, settings, digest):
    """Digests of the batches and rows of all steps, recorded then."""
    loader = open_loader(config(num_steps=70, batch_size=8, **settings), built_by_source.shards)
    content = hashlib.sha256()
    for step in range(70):
        for values in chain(map(torch.Tensor.numpy, loader.batch(step)), loader.rows(step)):
            content.update(values.astype(np.int64).tobytes())
    assert content.hexdigest() == digest
    (data_phase,) = loader.data_phases
    assert data_phase.seq_len == 16


# --- phases -------------------------------------------------------------------------------------------------------


def test_a_batch_ramp_takes_the_rows_in_the_order_that_they_have_without_it(built_by_source):
    ramp = open_loader(config(*RAMP), built_by_source.shards)
    plain = open_loader(config(num_steps=100), built_by_source.shards)  # 10 x 4 + 15 x 8 + 15 x 16 rows of 4
    assert [len(ramp.batch(step).inputs) for step in (0, 9, 10, 24, 25, 39)] == [4, 4, 8, 8, 16, 16]
    assert rows(ramp, *range(40)) == rows(plain, *range(100))
    assert torch.equal(ramp.batch(10).targets, torch.cat([plain.batch(step).targets for step in (10, 11)]))


@pytest.mark.parametrize("settings", [{}, {"stride": 5}, {"packing": "best_fit"}], ids=str)
def test_with_another_mixture_a_stream_goes_on_where_it_was_left(built_by_source, settings):
    """The oracle is the order of the stream's rows in a run of it alone."""
    annealing = {"from_step": 25, "exercise_ratio": 0.1, "mixture": {"weights": {"songs": 3, "Big-books": 1}}}
    loader = open_loader(config(RAMP[0], annealing, **settings), built_by_source.shards)
    read = rows(loader, *range(40))
    for name in ("songs", "Big-books"):
        alone = config(num_steps=400, exercise_ratio=0.0, mixture={"weights": {name: 1}}, **settings)
        expected = rows(open_loader(alone, built_by_source.shards), *range(400))
        got = [row for row in read if row[0] == name]
        assert got == expected[: len(got)]
    counts = Counter(name for name, _, _ in rows(loader, *range(25, 40)))
    assert counts["exercises"] == 6  # a tenth of 15 x 4
    assert counts["songs"] > 2 * counts["Big-books"]


def test_rows_of_another_length_have_an_order_of_their_own_and_the_first_goes_on_after_them(built_by_source):
    loader = open_loader(
        config({"from_step": 10, "seq_len": 32}, {"from_step": 20}, num_steps=30), built_by_source.shards
    )
    plain = open_loader(config(num_steps=20), built_by_source.shards)
    read, expected = rows(loader, *range(10), *range(20, 30)), rows(plain, *range(20))
    for name in loader.streams:
        ours, theirs = ([row for row in each if row[0] == name] for each in (read, expected))
        count = min(len(ours), len(theirs))
        assert ours[:count] == theirs[:count]
        assert count > 5
    assert rows(loader, *range(10, 20)) != rows(plain, *range(10))
    assert loader.batch(10).inputs.shape == (4, 32)
    assert loader.batch(20).inputs.shape == (4, 16)


def test_batches_across_phases_do_not_depend_on_what_was_read_before_nor_on_the_world_size(built_by_source):
    run = config(*RAMP, {"from_step": 30, "seq_len": 32})
    used = open_loader(run, built_by_source.shards)
    for step in (39, 0, 25, 9, 10, 31, 24, 29):
        alone = open_loader(run, built_by_source.shards).batch(step)
        parts = [used.batch(step, rank=rank, world_size=2) for rank in range(2)]
        for whole_BT, slices in zip(alone, zip(*parts, strict=True), strict=True):
            assert torch.equal(whole_BT, torch.stack(slices, dim=1).flatten(0, 1))


def test_a_limit_of_epochs_holds_over_all_phases(built_by_source):
    """Songs are asked for all the way, and their two epochs are used up in the second phase of two lengths."""
    mixture = {"weights": {"songs": 1, "Big-books": 1}, "max_epochs": 9, "max_epochs_of": {"songs": 2.0}}
    run = config({"from_step": 20, "seq_len": 32}, num_steps=80, exercise_ratio=0.0, batch_size=8, mixture=mixture)
    first, second = plan_data_phases(run, built_by_source.shards)
    songs = built_by_source.shards.stream("songs", "train").num_tokens
    assert (first.parts["songs"].reached, first.parts["songs"].reason) == (0.5, "")
    assert first.parts["songs"].epochs == pytest.approx(0.5 * 20 * 8 * 16 / songs)
    assert second.parts["songs"].reached == pytest.approx(2 * songs / (60 * 8 * 32) - 0.5 * 20 / (60 * 2))
    assert (second.parts["songs"].epochs, second.parts["songs"].reason) == (2.0, "at its limit of epochs")
    loader = open_loader(run, built_by_source.shards)
    assert loader.epochs("songs") == pytest.approx(2.0, abs=0.03)
    both = sum(data_phase.num_targets("songs") for data_phase in loader.data_phases)
    assert loader.num_targets("songs") == both


def test_a_stream_that_comes_with_a_later_phase_is_read_from_its_beginning(built_by_source):
    books = {"weights": {"Big-books": 1}}
    loader = open_loader(config({"from_step": 20, "mixture": {}}, mixture=books), built_by_source.shards)
    assert {name for name, _, _ in rows(loader, *range(20))} == {"Big-books", "exercises"}
    songs = [row for row in rows(loader, *range(20, 40)) if row[0] == "songs"]
    alone = open_loader(config(exercise_ratio=0.0, mixture={"weights": {"songs": 1}}), built_by_source.shards)
    assert songs == rows(alone, *range(40))[: len(songs)] != []


# --- trace --------------------------------------------------------------------------------------------------------

PHASES = (
    {"from_step": 8, "batch_size": 8},
    {"from_step": 14, "seq_len": 32},
    {"from_step": 26, "exercise_ratio": 0.6, "mixture": {"weights": {"songs": 1}}},
)


@pytest.mark.parametrize("settings", [{}, {"stride": 9}, {"packing": "best_fit"}], ids=str)
def test_what_saw_a_document_is_what_a_scan_over_all_rows_of_all_phases_finds(built_by_source, settings):
    shards, run = built_by_source.shards, config(*PHASES, **settings)
    loader = open_loader(run, shards)
    expected = defaultdict(list)
    for step in range(40):
        batch = loader.batch(step)
        seen = []
        for row in range(run.phase_of(step).batch_size):
            traced = trace_row(shards, run, step=step, row=row)
            tokens = []
            for span in traced.spans:
                document = shards.stream(traced.stream, "train").document(span.number)
                tokens += document.tokens[span.first : span.stop].tolist()
                seen.append(span.document_id)
                place = Sighting(step=step, row=row, epoch=traced.epoch, first=span.first, stop=span.stop)
                expected[traced.stream, span.document_id].append(place)
            held = batch.inputs[row][batch.documents[row] >= 0].tolist()
            assert tokens[: len(held)] == held
        assert documents_of(loader, step) == list(dict.fromkeys(seen))
    assert len(expected) > 50
    for (stream, document_id), sightings in list(expected.items())[::3]:
        (found,) = trace_document(shards, run, document_id)
        assert (found.stream, list(found.sightings)) == (stream, sightings)


def test_a_row_that_its_phase_lacks_is_an_error(built_by_source):
    trace_row(built_by_source.shards, config(*PHASES), step=8, row=7)
    with pytest.raises(ConfigError, match="row: got 4, expected 0 to 3, as the step had 4"):
        trace_row(built_by_source.shards, config(*PHASES), step=7, row=4)


# --- bad input ----------------------------------------------------------------------------------------------------


def test_a_phase_with_fewer_rows_than_a_batch_is_an_error_that_names_it(built_by_source):
    with pytest.raises(DataError, match=r"one batch .*of batch_size 400\).*lower .* of the phase from step 25"):
        open_loader(config(RAMP[0], {"from_step": 25, "batch_size": 400}), built_by_source.shards)
    with pytest.raises(DataError, match=r"rows of 32 tokens .*lower batch_size or seq_len of the phase from step 25"):
        open_loader(config({"from_step": 25, "seq_len": 32, "batch_size": 200}), built_by_source.shards)


def test_a_phase_that_asks_for_what_is_not_there_is_an_error_that_names_its_setting(built_by_source):
    mixture = {"weights": {"web": 1}}
    with pytest.raises(ConfigError, match=r"pretrain\.phases\.1\.mixture\.weights: got 'web'"):
        open_loader(config(RAMP[0], {"from_step": 20, "mixture": mixture}), built_by_source.shards)
