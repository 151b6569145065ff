"""Damage, verification, uploads and locks of artifacts, in both kinds of store."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import time

import pytest

from lilpipe import digests
from lilpipe import store as store_module
from lilpipe.artifact import SCHEMA_VERSION
from lilpipe.digests import SETTLED_SECONDS
from lilpipe.errors import ArtifactError, SchemaVersionError, StoreError
from lilpipe.pipeline.plan import plan
from lilpipe.pipeline.run import run_step
from lilpipe.store import Store
from tests.conftest import toy_config
from tests.pipeline.toy_runs import run_all


def test_a_deleted_or_damaged_output_is_rebuilt_and_never_served(store, faults, files):
    (first, _), _ = run_all(toy_config(), store)
    files.write(f"{first.uri}/data", "half 0")
    planned = plan(toy_config(), store)["first"]
    assert planned.status == "run"
    assert "data: 6 bytes, expected" in planned.reason
    (rebuilt, cached), (_, second_cached) = run_all(toy_config(), store)
    assert not cached
    assert second_cached  # the same bytes came out
    assert rebuilt.content_digest == first.content_digest
    assert f"prompts/{first.manifest.fingerprint}.0/data" in files.under("damaged")
    files.delete(rebuilt.uri)
    assert [cached for _, cached in run_all(toy_config(), store)] == [False, True]


def test_a_flipped_bit_is_found_before_a_stage_reads_it(store, faults, files):
    (first, _), _ = run_all(toy_config(), store)
    files.flip(f"{first.uri}/data")
    changed = toy_config(tokenizer={"vocab_size": 999})  # `second` runs again and reads what is damaged
    if store.remote:
        shutil.rmtree(store.local / "cache")  # as on another machine
        with pytest.raises(ArtifactError, match=r"data: its SHA-256 differs .* moved to .*damaged/prompts"):
            run_all(changed, store)
    else:
        assert "data: its SHA-256 differs" in plan(changed, store)["first"].reason
        with pytest.raises(ArtifactError, match=r"its inputs are not built yet: first .*SHA-256 differs"):
            run_step(changed, "second", store=store, pipeline_run="lone")
    (rebuilt, cached), (second, _) = run_all(changed, store)
    assert not cached
    assert rebuilt.content_digest == first.content_digest
    assert (second.path / "read").read_text() == "HALF 0, WHOLE, 300"
    assert f"prompts/{first.manifest.fingerprint}.0/data" in files.under("damaged")


def test_each_file_of_an_artifact_is_verified(store, faults, files):
    (first, _), _ = run_all(toy_config(), store)
    names = [name for name, entry in first.manifest.files.items() if entry.size]
    for number, name in enumerate((*names, "manifest.json")):
        files.flip(f"{first.uri}/{name}")
        shutil.rmtree(store.local / "cache", ignore_errors=True)
        lookup = store.find("prompts", first.manifest.fingerprint)
        if lookup.artifact is not None:
            with pytest.raises(ArtifactError, match=f"{name}: its SHA-256 differs"):
                store.fetch(lookup.artifact)
        else:
            assert name in lookup.problems[0]
        assert [cached for _, cached in run_all(toy_config(), store)] == [False, True], name
        assert store.uri("prompts", first.manifest.fingerprint) == first.uri
        assert len({path.split("/")[1] for path in files.under("damaged")}) == number + 1


def test_a_damaged_download_is_repeated(store, faults, files):
    if not store.remote:
        pytest.skip("nothing is downloaded from a local store")
    (first, _), _ = run_all(toy_config(), store)
    (store.local / "cache" / "prompts" / first.manifest.fingerprint / "data").write_text("half 0, whale, 300")
    found = store.find("prompts", first.manifest.fingerprint).artifact
    assert (store.fetch(found).path / "data").read_text() == "half 0, whole, 300"
    assert not files.under("damaged")


def test_what_was_verified_is_not_read_again(store, faults, monkeypatch):
    (first, _), _ = run_all(toy_config(), store)
    time.sleep(2 * SETTLED_SECONDS)
    store.fetch(first)
    monkeypatch.setattr(digests, "digest_file", lambda path: pytest.fail(f"{path} was read again"))
    again = Store(store.root, local=str(store.local))  # as in another process
    found = again.find("prompts", first.manifest.fingerprint).artifact
    assert found is not None
    again.fetch(found)


@pytest.mark.parametrize("manifest", ["{", "{}", "", "[]", '{"schema_version": "new"}'])
def test_an_unreadable_manifest_is_no_commit(store, faults, files, manifest):
    (first, _), _ = run_all(toy_config(), store)
    files.write(f"{first.uri}/manifest.json", manifest)
    assert plan(toy_config(), store)["first"].status == "run"
    assert store.manifests("prompts") == []
    before = files.under("artifacts")
    assert [cached for _, cached in run_all(toy_config(), store)] == [False, True]
    assert files.under("artifacts") == before
    kept = f"{store.root}/damaged/prompts/{first.manifest.fingerprint}.0"
    assert files.read(f"{kept}/data") == b"half 0, whole, 300"  # nothing was deleted
    assert files.read(f"{kept}/manifest.json") == manifest.encode()


def test_a_manifest_of_a_newer_version_is_an_error_that_names_both(store, faults, files):
    (first, _), _ = run_all(toy_config(), store)
    place = f"{first.uri}/manifest.json"
    newer = json.dumps({**json.loads(files.read(place)), "schema_version": SCHEMA_VERSION + 1, "origin": "new"})
    files.write(place, newer)
    message = f"got a manifest of schema version {SCHEMA_VERSION + 1}, expected at most {SCHEMA_VERSION}; upgrade"
    for attempt in (lambda: plan(toy_config(), store), lambda: run_all(toy_config(), store)):
        with pytest.raises(SchemaVersionError, match=message):
            attempt()
    assert files.read(place) == newer.encode()
    assert not files.under("damaged")
    other = toy_config(prompts={"num_validation": 7})
    assert [cached for _, cached in run_all(other, store)] == [False, False]  # artifacts beside it are usable


def test_a_store_that_cannot_be_written_is_one_clear_error(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(StoreError, match="check LILPIPE_STORE"):
        Store(str(blocked))


def test_an_artifact_in_object_storage_is_downloaded_to_another_machine(s3_bucket, tmp_path, faults):
    store = Store(s3_bucket, local=str(tmp_path / "here"))
    (first, _), (second, _) = run_all(toy_config(), store)
    assert first.uri.startswith("s3://")
    elsewhere = Store(s3_bucket, local=str(tmp_path / "there"))
    assert [p.status for p in plan(toy_config(), elsewhere).values()] == ["cached", "cached"]
    found = elsewhere.find("tokenizer", second.manifest.fingerprint).artifact
    assert found is not None
    assert (elsewhere.fetch(found).path / "read").read_text() == "HALF 0, WHOLE, 300"
    changed = toy_config(tokenizer={"vocab_size": 999})
    assert [cached for _, cached in run_all(changed, elsewhere)] == [True, False]
    assert set(elsewhere.refs("run")) == {"first", "second"}
    assert len(elsewhere.manifests("tokenizer")) == 2


def test_an_upload_without_its_manifest_is_no_commit(store, faults, files, monkeypatch):
    def interrupted(*arguments, **settings):
        raise OSError(errno.ECONNRESET, "Connection reset by peer")

    with monkeypatch.context() as patch:
        if store.remote:
            patch.setattr(store.fs, "pipe_file", interrupted)
        else:
            patch.setattr(store_module, "write_atomically", interrupted)
        with pytest.raises(StoreError, match="Connection reset"):
            run_step(toy_config(), "first", store=store, pipeline_run="run")
    assert plan(toy_config(), store)["first"].reason == "resumes from where it was interrupted"
    assert [cached for _, cached in run_all(toy_config(), store)] == [False, False]


def test_the_lock_is_free_again_after_its_holder_was_killed(store):
    context = multiprocessing.get_context("spawn")
    holding = context.Event()
    holder = context.Process(target=_hold, args=(store.root, str(store.local), holding))
    holder.start()
    assert holding.wait(30)
    os.kill(holder.pid, signal.SIGKILL)  # type: ignore[arg-type]
    holder.join()
    with store.lock("prompts", "f" * 64) as waited:
        assert not waited


def _hold(root, local, holding):
    with Store(root, local=local).lock("prompts", "f" * 64):
        holding.set()
        time.sleep(60)
