from collections import defaultdict

import pytest

from lilpipe.config.model import ModelConfig
from lilpipe.config.phases import MixtureConfig
from lilpipe.config.training import PretrainConfig
from lilpipe.errors import ConfigError, DataError
from lilpipe.tokens.data_phase_plan import open_loader
from lilpipe.tokens.loader import IGNORED
from lilpipe.tokens.trace import Sighting, trace_document, trace_row

MODEL = ModelConfig(hidden_size=8, num_layers=1, num_heads=1, num_kv_heads=1, intermediate_size=8, max_seq_len=16)
VARIANTS = [{}, {"stride": 5}, {"packing": "best_fit"}]


def config(**settings):
    return PretrainConfig.model_validate(
        {"seed": 5, "model": MODEL, "num_steps": 70, "batch_size": 8, "exercise_ratio": 0.3, **settings}
    )


def tokens_of(shards, name):
    """Every document of a stream's training split as a list, by number."""
    stream = shards.stream(name, "train")
    return [stream.document(number).tokens.tolist() for number in range(stream.num_documents)]


@pytest.mark.parametrize("settings", VARIANTS)
def test_the_spans_of_a_row_are_the_tokens_that_it_held(built_by_source, settings):
    shards, run = built_by_source.shards, config(num_steps=600, **settings)
    documents = {name: tokens_of(shards, name) for name in shards.streams}
    loader = open_loader(run, shards)
    rows = [trace_row(shards, run, step=step, row=row) for step in (0, 301, 599) for row in range(8)]
    assert {row.stream for row in rows} == {"Big-books", "songs", "exercises"}
    assert max(row.epoch for row in rows) >= 2
    for traced in rows:
        inputs, targets, numbers, _ = (values[traced.row].tolist() for values in loader.batch(traced.step))
        held = [token for token, number in zip(inputs, numbers, strict=True) if number >= 0]
        held += targets[-1:] if targets[-1] != IGNORED else []
        told = [t for s in traced.spans for t in documents[traced.stream][s.number][s.first : s.stop]]
        assert told[: len(held)] == held
        assert len(told) <= 17
        for span in traced.spans:
            document = shards.stream(traced.stream, "train").document(span.number)
            assert (span.document_id, span.source) == (document.id, document.source)
            assert span.num_tokens == len(document.tokens)
            assert 0 <= span.first < span.stop <= span.num_tokens


@pytest.mark.parametrize("settings", VARIANTS)
def test_the_sightings_of_documents_are_those_of_a_scan_over_all_rows(built_by_source, settings):
    shards, run = built_by_source.shards, config(**settings)
    expected = defaultdict(list)
    for step in range(70):
        for row in range(8):
            if (step * 8 + row) % 4:  # a quarter of the rows, and then only documents seen in one of them
                continue
            traced = trace_row(shards, run, step=step, row=row)
            for span in traced.spans:
                expected[traced.stream, span.document_id].append(
                    Sighting(step=step, row=row, epoch=traced.epoch, first=span.first, stop=span.stop)
                )
    assert len(expected) > 50
    for (stream, document_id), sightings in list(expected.items())[::5]:
        (found,) = trace_document(shards, run, document_id)
        assert (found.document_id, found.stream, found.split) == (document_id, stream, "train")
        assert [each for each in found.sightings if (each.step * 8 + each.row) % 4 == 0] == sightings
        assert list(found.sightings) == sorted(found.sightings, key=lambda each: (each.step, each.row))


@pytest.mark.parametrize("settings", VARIANTS)
def test_every_document_was_seen_as_often_as_its_stream_was_passed(built_by_source, settings):
    shards = built_by_source.shards
    run = config(num_steps=300, **settings)
    loader = open_loader(run, shards)
    (data_phase,) = loader.data_phases
    for name, source in data_phase.sources.items():
        packing, stream, count = source.packing, shards.stream(name, "train"), data_phase.count(name)
        for number in range(0, stream.num_documents, 7):
            times = len(data_phase.sightings(name, packing.rows_of(number))[0])
            rows = len(packing.rows_of(number))
            assert rows * (count // packing.num_rows) <= times <= rows * -(-count // packing.num_rows)


def test_a_document_held_out_is_found_and_was_never_seen(built_by_source):
    shards = built_by_source.shards
    document = shards.stream("songs", "validation").document(0)
    (found,) = trace_document(shards, config(), document.id)
    assert (found.split, found.stream, found.sightings) == ("validation", "songs", ())


def test_a_document_of_a_stream_without_weight_was_never_seen(built_by_source):
    shards = built_by_source.shards
    run = config(mixture=MixtureConfig(weights={"Big-books": 1.0}))
    document = shards.stream("songs", "train").document(0)
    (found,) = trace_document(shards, run, document.id)
    assert (found.split, found.sightings) == ("train", ())


def test_places_that_the_run_lacks_and_unknown_documents_are_errors(built_by_source):
    shards = built_by_source.shards
    with pytest.raises(ConfigError, match="step: got 70, expected 0 to 69, as the run had 70"):
        trace_row(shards, config(), step=70, row=0)
    with pytest.raises(ConfigError, match="row: got -1, expected 0 to 7"):
        trace_row(shards, config(), step=0, row=-1)
    with pytest.raises(DataError, match=r"document 'doc/999': in none of the streams Big-books, songs, exercises"):
        trace_document(shards, config(), "doc/999")
