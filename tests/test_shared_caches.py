"""Processes that start at once on one empty cache, one that is killed while it writes, and caches without room."""

import http.server
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from launching import SECONDS, Group, finish, output, summary

from medqa import cache as baseline
from medqa import cache as token_cache
from medqa.data import readers

FORK = multiprocessing.get_context("fork")
AT_ONCE = 6
VALUE = {"rows": [[0.25, 3]] * 10_000}


def arrays(size: int = 200_000) -> token_cache.Arrays:
    return {"ids": np.arange(size, dtype=np.int32), "starts": np.arange(7)}


def at_once(work: Callable[[int], None], processes: int = AT_ONCE) -> list[int | None]:
    """Exit codes of so many processes that begin the work at the same moment."""
    gate = FORK.Barrier(processes)

    def body(i: int) -> None:
        gate.wait(SECONDS)
        work(i)

    running = [FORK.Process(target=body, args=(i,)) for i in range(processes)]
    for process in running:
        process.start()
    for process in running:
        process.join(SECONDS)
    codes = [process.exitcode for process in running]
    for process in running:
        process.kill()
    return codes


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDQA_CACHE", str(tmp_path / "not" / "there"))
    return tmp_path / "not" / "there"


def test_all_that_start_at_once_have_the_token_ids(cache):
    def work(i: int) -> None:
        for key in ("one", "another"):
            found = token_cache.cached(key, arrays)
            assert all(np.array_equal(found[name], array) for name, array in arrays().items())

    assert at_once(work) == [0] * AT_ONCE
    assert sorted(path.name for path in (cache / "tokens").iterdir()) == ["another.safetensors", "one.safetensors"]
    assert token_cache.cached("one", dict)["starts"].tolist() == list(range(7)), "what is kept is whole"


def test_all_that_start_at_once_have_the_baseline(cache):
    """Each keeps it again and again, and what it reads meanwhile is the whole of it or nothing."""

    def work(i: int) -> None:
        for _ in range(3):
            assert baseline.find("base") in (None, VALUE)
            baseline.keep("base", VALUE)
            assert baseline.find("base") == VALUE

    assert at_once(work) == [0] * AT_ONCE
    assert len(list((cache / "baselines").iterdir())) == 1


def test_one_that_is_killed_while_it_writes_is_in_nobodys_way(cache, monkeypatch):
    """Killed at whatever moment: once a folder is there in which it has begun to write."""

    def work() -> None:
        for i in range(1000):
            token_cache.cached(f"key{i}", lambda: arrays(5_000_000))

    left = set()
    for _ in range(5):
        process = FORK.Process(target=work)
        process.start()
        deadline = time.monotonic() + SECONDS
        while not (begun := set((cache / "tokens").glob("tmp*")) - left) and time.monotonic() < deadline:
            time.sleep(0.0005)
        process.kill()
        process.join()
        left |= {path for path in begun if path.exists()}
        for path in (cache / "tokens").glob("*.safetensors"):
            assert token_cache._read(path) is not None, "in its place only what is whole"
            path.unlink()
    assert left, "killed in mid-write at least once"
    assert token_cache.cached("key0", lambda: arrays(5))["ids"].size == 5
    assert token_cache.cached("key0", dict)["ids"].size == 5, "kept in spite of what was left"
    assert left <= set((cache / "tokens").iterdir()), "for another may be at it"
    for path in left:
        os.utime(path, (time.time() - 2 * token_cache.ABANDONED_S,) * 2)
    token_cache.cached("key1", lambda: arrays(5))
    assert not left & set((cache / "tokens").iterdir())


def test_a_damaged_entry_is_replaced(cache):
    token_cache.cached("key", arrays)
    baseline.keep("base", VALUE)
    (entry,), (kept,) = (list((cache / name).iterdir()) for name in ("tokens", "baselines"))
    for path in (entry, kept):
        path.write_bytes(path.read_bytes()[:-40])
    assert baseline.find("base") is None
    baseline.keep("base", VALUE)
    assert baseline.find("base") == VALUE
    assert token_cache.cached("key", arrays)["ids"].size == 200_000
    assert token_cache.cached("key", dict)["ids"].size == 200_000


def use_both() -> None:
    """What a run and an evaluation do, with a cache that cannot keep it."""
    assert token_cache.cached("new", arrays)["ids"].size == 200_000
    baseline.keep("new", VALUE)
    assert baseline.find("new") is None


def test_a_full_cache_is_no_error(cache):
    def work(i: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # a write beyond fails, as where there is no room
        use_both()

    assert at_once(work, 2) == [0, 0]
    assert list((cache / "tokens").iterdir()) == list((cache / "baselines").iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which needs root")
def test_another_users_cache_is_read_and_never_written(monkeypatch):
    place = Path(tempfile.mkdtemp(prefix="medqa-cache-"))
    try:
        place.chmod(0o755)
        monkeypatch.setenv("MEDQA_CACHE", str(place / "cache"))
        token_cache.cached("key", arrays)
        baseline.keep("base", VALUE)
        files = {path: path.stat().st_mtime_ns for path in place.rglob("*")}

        def work(i: int) -> None:
            os.setuid(65534)
            assert token_cache.cached("key", dict)["ids"].size == 200_000
            assert baseline.find("base") == VALUE
            use_both()

        assert at_once(work, 2) == [0, 0]
        assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == files
    finally:
        shutil.rmtree(place)


class Kaggle(http.server.BaseHTTPRequestHandler):
    """A little of Kaggle's API: one dataset, sent slowly enough for all to be at it at once."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.endswith("/GetDataset"):
            self.reply(json.dumps({"currentVersionNumber": 3}).encode(), "application/json")
        else:
            self.server.downloads.append(1)
            file = io.BytesIO()
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("medquad.csv", "question,answer\n" + "What ?,This.\n" * 20_000)
            self.reply(file.getvalue(), "application/zip")

    def reply(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        for start in range(0, len(body), 50_000):
            self.wfile.write(body[start : start + 50_000])
            time.sleep(0.02)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def kaggle(tmp_path, monkeypatch) -> Iterator[http.server.ThreadingHTTPServer]:
    import kagglehub.http_resolver  # once, before the processes  # noqa: F401
    from kagglesdk import kaggle_env

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Kaggle)
    server.downloads = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(readers, "connects", lambda url: True)
    monkeypatch.setitem(
        kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, f"http://127.0.0.1:{server.server_port}"
    )
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "kaggle"))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.shutdown()
    server.server_close()


def read_from_kaggle(i: int = 0) -> None:
    found = readers.read_kaggle("owner/name", frozenset({"question", "answer"}), "--medquad")
    assert len(found.records) == 20_000


def test_all_that_start_at_once_have_the_dataset_from_kaggle(kaggle):
    assert at_once(read_from_kaggle) == [0] * AT_ONCE
    assert len(kaggle.downloads) == 1, "the first has fetched it, the others have waited"


def test_one_that_is_killed_while_it_downloads_holds_nobody_up(kaggle, tmp_path):
    process = FORK.Process(target=read_from_kaggle)
    process.start()
    deadline = time.monotonic() + SECONDS
    while not list(tmp_path.rglob("*.archive")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list(tmp_path.rglob("*.archive")), "killed in the middle"
    assert at_once(read_from_kaggle, 2) == [0, 0]


# `train.py`, keeping the token ids of the few embedded rows too.
KEEPING = """
import sys
import medqa.data.tokens as tokens
import train

tokens.WORTH_KEEPING = 1
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_four_experiments_at_once_share_an_empty_cache(tmp_path):
    script = tmp_path / "keeping.py"
    script.write_text(KEEPING)
    words = ("training.max_steps=4", "scheduler.warmup_steps=0", "evaluation.rows=4", "tracking.wandb=disabled")
    runs = {}
    for i in range(1, 5):
        directory = tmp_path / f"exp_00{i}"
        more = ("--exp", directory.name, "--tiny", "--set", *words)
        runs[directory] = Group.of(
            directory, ["--cpu", "--output-dir", str(directory), *more], 1, script,
            MEDQA_CACHE=str(tmp_path / "cache"),
        )  # fmt: skip
    for directory, group in runs.items():
        assert finish(group, directory) == 0, output(directory)
        assert summary(directory)["updates"] == 4
    kept = list((tmp_path / "cache" / "tokens").iterdir())
    assert kept
    assert all(path.suffix == ".safetensors" for path in kept)
