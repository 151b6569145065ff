import hashlib
import random
from collections import Counter, defaultdict
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lilpipe.config.corpus import CorpusConfig
from lilpipe.data import survey
from lilpipe.data.executors.executor import open_executor
from lilpipe.data.filters.chain import Document
from lilpipe.data.filters.frequent_keys import contains, frequent_keys
from lilpipe.data.survey import (
    NO_DATE,
    KeyCounter,
    MergeCounts,
    MergePages,
    PageList,
    dropped_pages,
    merged_files,
    parse_date,
    plan_merge,
    shard_buckets,
)


def spread(number):
    """A key of all 64 bits."""
    return int.from_bytes(hashlib.sha256(str(number).encode()).digest()[:8])


def document_keys(document):
    return np.array([spread(word) for word in document.text.split()], np.uint64)


def write_counts(folder, shards):
    for rank, texts in enumerate(shards):
        counter = KeyCounter(folder, rank, document_keys)
        for number, text in enumerate(texts):
            counter.add(Document(id="", text=text, source="", key=spread((rank, number))))
        counter.close()


def merge(tasks, step, ranks=None):
    for rank in range(len(tasks)) if ranks is None else ranks:
        step.run(rank=rank)


def draw_shards(seed, num_shards=6, num_documents=30):
    draw = random.Random(seed)
    words = [f"w{int(draw.expovariate(0.05))}" for _ in range(2_000)]
    return [[" ".join(draw.choices(words, k=12)) for _ in range(num_documents)] for _ in range(num_shards)]


def document_counts(shards):
    """How many documents hold each key, by a plain count."""
    return Counter(spread(word) for texts in shards for text in texts for word in set(text.split()))


@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr(survey, "FILE_KEYS", 50)
    monkeypatch.setattr(survey, "MERGE_KEYS", 200)


@pytest.mark.parametrize("most", [0, 1, 6, 10**6])
def test_the_frequent_keys_of_a_bucket_are_those_of_a_plain_count(tmp_path, small_files, most):
    shards = draw_shards(0)
    write_counts(tmp_path, shards)
    buckets = [range(2), range(2, 6)]
    tasks = plan_merge(tmp_path, buckets)
    assert len(tasks) > 4
    merge(tasks, MergeCounts(tasks, most))
    for bucket in buckets:
        counts = document_counts(shards[bucket.start : bucket.stop])
        expected = sorted(key for key, count in counts.items() if count > most)
        for shard in bucket:
            assert frequent_keys(merged_files(tasks, shard)).tolist() == expected


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=4), min_size=1, max_size=4), st.integers(0, 3)
)
def test_any_shards_are_counted_as_by_hand_also_empty_ones(tmp_path_factory, shards, most):
    folder = tmp_path_factory.mktemp("survey")
    texts = [[" ".join(map(str, numbers)) for numbers in shard] for shard in shards]
    write_counts(folder, texts)
    tasks = plan_merge(folder, shard_buckets(folder, len(shards), bucket_documents=10**9))
    merge(tasks, MergeCounts(tasks, most))
    expected = sorted(key for key, count in document_counts(texts).items() if count > most)
    assert frequent_keys(merged_files(tasks, 0)).tolist() == expected


def test_how_documents_are_cut_into_shards_changes_nothing(tmp_path):
    documents = [text for texts in draw_shards(1) for text in texts]
    found = []
    for num_shards in (1, 4, 9):
        folder = tmp_path / str(num_shards)
        write_counts(folder, [documents[rank::num_shards] for rank in range(num_shards)])
        tasks = plan_merge(folder, [range(num_shards)])
        merge(tasks, MergeCounts(tasks, 5))
        found.append(frequent_keys(merged_files(tasks, 0)).tolist())
    assert found[0] == found[1] == found[2] != []


def test_a_merge_task_reads_its_share_and_all_tasks_read_every_key_once(tmp_path, monkeypatch):
    """So memory depends on MERGE_KEYS, and ten times the corpus gives ten times the tasks."""
    monkeypatch.setattr(survey, "MERGE_KEYS", 300)
    num_tasks = []
    for size in (1, 10):
        folder = tmp_path / str(size)
        shards = [[f"{size}-{rank}-{number}" for number in range(100 * size)] for rank in range(6)]
        write_counts(folder, shards)
        tasks = plan_merge(folder, [range(6)])
        read = [np.concatenate([rows["key"].to_numpy() for _, rows in task.slices()]) for task in tasks]
        assert max(map(len, read)) < 1.5 * 300
        assert sorted(np.concatenate(read).tolist()) == sorted(document_counts(shards).elements())
        num_tasks.append(len(tasks))
    assert num_tasks == [2, 20]


def test_a_file_of_a_shard_is_of_bounded_size_however_large_the_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "FILE_KEYS", 100)
    write_counts(tmp_path, [[" ".join(map(str, range(start, start + 10))) for start in range(0, 5_000, 10)]])
    rows = [survey.read_table(path).num_rows for path in tmp_path.glob("*.arrow")]
    assert sum(rows) == 5_000
    assert max(rows) < 110


def test_a_merge_that_was_killed_goes_on_and_ends_in_the_same_bytes(tmp_path, small_files):
    write_counts(tmp_path, draw_shards(2))
    tasks = plan_merge(tmp_path, [range(6)])
    assert plan_merge(tmp_path, [range(6)]) == tasks
    merge(tasks, MergeCounts(tasks, 3), ranks=reversed(range(len(tasks))))
    whole = {task.output: task.output.read_bytes() for task in tasks}
    for task in tasks[1:]:
        task.output.unlink()
    temporary = tasks[1].output.with_name(f".{tasks[1].output.name}.1.tmp")
    temporary.write_bytes(whole[tasks[1].output][:100])
    done: list[int] = []
    step = MergeCounts(tasks, 3)
    with open_executor(CorpusConfig(num_workers=1)) as run_tasks:
        run_tasks([step], num_tasks=len(tasks), folder=tmp_path / "log", on_done=done.append)
    assert {task.output: task.output.read_bytes() for task in tasks} == whole


@pytest.mark.parametrize(
    ("sizes", "bucket_documents", "expected"),
    [
        ([10, 10, 10, 10], 20, [range(2), range(2, 4)]),
        ([10, 10, 10, 10], 1000, [range(4)]),
        ([10, 10, 10, 10], 1, [range(1), range(1, 2), range(2, 3), range(3, 4)]),
        ([10, 10, 10], 20, [range(2), range(2, 3)]),
        ([10, 10, 10, 10, 10], 45, [range(5)]),
        ([0, 0], 5, [range(2)]),
    ],
)
def test_buckets_are_neighbouring_shards_with_about_as_many_documents(tmp_path, sizes, bucket_documents, expected):
    write_counts(tmp_path, [[f"{rank}-{number}" for number in range(size)] for rank, size in enumerate(sizes)])
    assert shard_buckets(tmp_path, len(sizes), bucket_documents) == expected


@given(st.lists(st.integers(0, 20)), st.lists(st.integers(0, 20)))
def test_membership_is_that_of_a_set(keys, wanted):
    found = contains(np.array(sorted(set(keys)), np.uint64), np.array(wanted, np.uint64))
    assert found.tolist() == [each in keys for each in wanted]


# --- pages with one address ---------------------------------------------------------------------------------------

DATES = ("", "2023-01-05", "2023-01-05T00:00:00Z", "2023-01-04T23:30:00-01:00", "2024", "last week", "1969-12-31")


def naive_dropped(shards):
    """Per shard, row to the id that stays, by sorting each address's pages."""
    pages = defaultdict(list)
    for rank, documents in enumerate(shards):
        for row, (url, date) in enumerate(documents):
            if url:
                pages[url].append((-parse_date(date), rank, row))
    dropped = [{} for _ in shards]
    for places in pages.values():
        (_, kept_rank, kept_row), *others = sorted(places)
        for _, rank, row in others:
            dropped[rank][row] = f"{kept_rank}/{kept_row}"
    return dropped


@pytest.mark.parametrize("seed", range(3))
def test_of_pages_with_one_address_the_most_recent_stays_then_the_first(tmp_path, small_files, seed):
    draw = random.Random(seed)
    urls = ["", *(f"u{number}" for number in range(80))]
    shards = [[(draw.choice(urls), draw.choice(DATES)) for _ in range(90)] for _ in range(5)]
    for rank, documents in enumerate(shards):
        pages = PageList(tmp_path, rank, spread)
        for row, (url, date) in enumerate(documents):
            pages.add(Document(id=f"{rank}/{row}", text="", source="", url=url, date=date), row)
        pages.close()
    tasks = plan_merge(tmp_path, [range(5)])
    assert len(tasks) > 1
    merge(tasks, MergePages(tasks))
    assert [dropped_pages(tasks, rank) for rank in range(5)] == naive_dropped(shards)


def test_a_corpus_without_addresses_drops_nothing(tmp_path):
    PageList(tmp_path, 0, spread).close()
    tasks = plan_merge(tmp_path, [range(1)])
    merge(tasks, MergePages(tasks))
    assert dropped_pages(tasks, 0) == {}


@given(st.datetimes(), st.integers(-12, 12))
def test_dates_are_compared_as_points_in_time(moment, hours):
    zone = timezone(timedelta(hours=hours))
    seconds = parse_date(moment.replace(tzinfo=zone).isoformat()) / 1_000_000
    expected = (moment - datetime(1970, 1, 1)).total_seconds() - 3_600 * hours
    assert seconds == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("date", "same"), [("2024", "2024-01-01"), ("2024-05", "2024-05-01T00:00:00Z"), (" 20240501 ", "2024-05-01")]
)
def test_a_year_or_a_month_stands_for_its_first_moment(date, same):
    expected = datetime.fromisoformat(same)
    assert parse_date(date) == (expected.replace(tzinfo=UTC)).timestamp() * 1_000_000


@pytest.mark.parametrize(
    "date",
    [
        "2023-11-14T22:13:20Z",
        "20231114221320",
        "1700000000",
        "1700000000.0",
        "1700000000000",
        "1700000000000000",
        "Tue, 14 Nov 2023 22:13:20 GMT",
        "Tue, 14 Nov 2023 23:13:20 +0100",
        "14 Nov 2023 22:13:20 +0000",
        "2023/11/14 22:13:20",
    ],
)
def test_a_moment_is_the_same_in_every_common_format(date):
    assert parse_date(date) == 1_700_000_000_000_000


def test_a_day_with_slashes_is_that_day():
    assert parse_date("2023/11/14") == parse_date("2023-11-14") != NO_DATE


@pytest.mark.parametrize(
    "date", ["", "yesterday", "2024-13-01", "0000", "12345", "20241301000000", "Tue, 32 Nov 2023", "a" * 99, "²" * 10]
)
def test_what_is_no_date_is_older_than_any(date):
    assert parse_date(date) == NO_DATE
