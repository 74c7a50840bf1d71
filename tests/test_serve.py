"""tools/serve.py: the interface, what is refused, many clients at once, and the page."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
import tiny
import uvicorn
from fastapi.testclient import TestClient

from bench import serve as load_test
from command import InputError
from loading import load
from manifest import Utterance
from tools import serve
from tools.batching import Batcher, Job
from tools.transcribe import transcribe

ROOT = Path(__file__).parents[1]
PATH = "/v1/audio/transcriptions"


@pytest.fixture(scope="module")
def model(projector):
    return load(projector)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Sounds of different pitches; the last has 31 s."""
    folder = tmp_path_factory.mktemp("sounds")
    files = []
    for pitch in (200, 300, 450, 600):
        files.append(tiny.make_sound(folder / f"{pitch}.wav", 0.5, pitch))
    return [*files, tiny.make_sound(folder / "long.wav", 31, 500)]


def make_app(projector, model, *flags):
    command = ["--projector_model_path", projector, "--num_beams", "1", *flags]
    args = serve.parse_arguments(serve.Arguments, command)
    args.load_model = lambda: model
    return serve.make_app(args)


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def client(projector, model):
    with TestClient(make_app(projector, model, "--max_megabytes", "2")) as client:
        wait_until(lambda: client.get("/health").status_code == 200)
        yield client


@pytest.fixture
def server(projector, model):
    """A service with places for three, its address, and a lock that holds recognition up."""
    app = make_app(projector, model, "--max_waiting", "3")
    service = app.state.service
    service.lock = threading.Lock()
    service.batches = []
    recognize = service.recognize

    def recognize_when_free(pieces, word_times):
        service.batches.append([piece.path for piece in pieces])
        with service.lock:
            recognize(pieces, word_times)

    service.recognize = recognize_when_free
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        service.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        running = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        wait_until(lambda: service.batcher is not None and running.started)
        yield service
        running.should_exit = True
        thread.join()


def post(client, path, **data):
    return client.post(PATH, files={"file": (path.name, path.read_bytes())}, data=data)


def test_formats_are_those_of_openai(client, model, sounds):
    short, long = sounds[0], sounds[-1]
    [text, long_text] = transcribe(model, [short, long], 1)
    assert post(client, short, model="whisper-1").json() == {"text": text}
    answer = post(client, short, response_format="text", language="en", temperature=0.5)
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.text == f"{text}\n"
    verbose = post(client, long, response_format="verbose_json", language="en").json()
    assert {**verbose, "segments": []} == {
        "task": "transcribe",
        "language": "en",
        "duration": 31.0,
        "text": long_text,
        "segments": [],
    }
    assert [segment["id"] for segment in verbose["segments"]] == [0, 1, 2, 3]
    assert " ".join(segment["text"] for segment in verbose["segments"]) == long_text
    granularity = {"timestamp_granularities[]": "word"}
    verbose = post(client, long, response_format="verbose_json", **granularity).json()
    assert "segments" not in verbose
    starts = [word["start"] for word in verbose["words"]]
    assert starts == sorted(starts)
    assert 20 < starts[-1] < 31
    assert post(client, short, response_format="vtt").text.startswith("WEBVTT\n\n00:00:00.000 -->")
    assert post(client, short, response_format="srt").text.startswith("1\n00:00:00,000 -->")


def test_what_is_no_request_is_refused_in_openais_shape(client, sounds, tmp_path):
    def refuse(status, **options):
        answer = client.post(PATH, **options)
        error = answer.json()["error"]
        assert (answer.status_code, error["type"]) == (status, "invalid_request_error")
        return error["message"]

    upload = {"file": ("notes.wav", b"no audio")}
    assert refuse(400, files=upload).startswith("notes.wav cannot be decoded as audio")
    good = {"file": ("a.wav", sounds[0].read_bytes())}
    message = refuse(400, files=good, data={"response_format": "xml"})
    assert message.startswith("response_format: ")
    assert "'verbose_json'" in message
    assert refuse(400, data={"model": "x"}) == "file: Field required"
    large = {"file": ("a.wav", bytes(2_100_000))}
    assert refuse(413, files=large) == "an upload may have 2 MB: --max_megabytes"
    assert client.get("/nothing").json()["error"]["message"] == "Not Found"


def test_audio_that_is_too_long_is_refused_before_it_is_decoded(projector, model, tmp_path):
    path = tiny.make_sound(tmp_path / "long.wav", 61, 300, rate=8000)
    with TestClient(make_app(projector, model, "--max_minutes", "1")) as client:
        wait_until(lambda: client.get("/health").status_code == 200)
        answer = post(client, path)
    assert answer.status_code == 400
    message = "long.wav has 1.02 minutes of audio, at most 1 are taken: cut it"
    assert answer.json()["error"]["message"] == message


def test_the_port_is_open_before_the_model_is_there(projector, model, sounds):
    app = make_app(projector, model)
    go_on = threading.Event()

    def load_later():
        go_on.wait()
        return model

    app.state.service.args.load_model = load_later
    with TestClient(app) as client:
        health = client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "loading"})
        refused = post(client, sounds[0])
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        [known] = client.get("/v1/models").json()["data"]
        assert (known["id"], known["object"]) == ("slim-asr", "model")
        go_on.set()
        wait_until(lambda: client.get("/health").json() == {"status": "ok", "waiting": 0})
        assert post(client, sounds[0]).status_code == 200


def test_requests_that_wait_are_one_batch_and_too_many_come_again(server, model, sounds):
    def send(path):
        return httpx2.post(
            server.url + PATH, files={"file": (path.name, path.read_bytes())}, timeout=60
        )

    with ThreadPoolExecutor(4) as pool:
        with server.lock:
            first = pool.submit(send, sounds[0])
            wait_until(lambda: server.batches)
            others = [pool.submit(send, path) for path in sounds[1:3]]
            wait_until(lambda: len(server.batcher.jobs) == 2)
            refused = send(sounds[3])
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
        assert "3 requests wait already" in refused.json()["error"]["message"]
        texts = [answer.result().json()["text"] for answer in (first, *others)]
    assert texts == transcribe(model, sounds[:3], 1)
    assert [len(batch) for batch in server.batches] == [1, 2]
    assert send(sounds[3]).status_code == 200


def test_a_client_that_goes_away_frees_its_place(server, sounds):
    with server.lock:
        upload = {"file": ("a.wav", sounds[0].read_bytes())}
        with ThreadPoolExecutor(1) as pool:
            working = pool.submit(httpx2.post, server.url + PATH, files=upload, timeout=60)
            wait_until(lambda: server.batches)
            with pytest.raises(httpx2.ReadTimeout):
                httpx2.post(server.url + PATH, files=upload, timeout=1)
            wait_until(lambda: server.places == 1)
            server.lock.release()
            assert working.result().status_code == 200
            server.lock.acquire()
    wait_until(lambda: not server.batcher.jobs)
    assert len(server.batches) == 1  # it was not recognised


def test_a_fault_is_a_500_and_the_service_goes_on(server, sounds):
    works = server.batcher.recognize

    def fail(pieces, word_times):
        raise RuntimeError("out of memory")

    server.batcher.recognize = fail
    upload = {"file": ("a.wav", sounds[0].read_bytes())}
    answer = httpx2.post(server.url + PATH, files=upload, timeout=60)
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert (error["message"], error["type"]) == ("RuntimeError: out of memory", "server_error")
    server.batcher.recognize = works
    assert httpx2.post(server.url + PATH, files=upload, timeout=60).status_code == 200
    assert server.places == 0


def make_job(name, count=1):
    pieces = [Utterance(f"{name}{i}", 1.0) for i in range(count)]
    return Job(pieces, word_times=False)


def test_short_audio_does_not_wait_for_the_end_of_long():
    batcher = Batcher(None, batch_size=3)
    batcher.jobs.extend([make_job("long", 5), make_job("a"), make_job("b"), make_job("c")])
    names = []
    with batcher.changed:
        while batcher.jobs:
            names.append([piece.path for _, piece in batcher.take()])
    assert names == [["long0", "a0", "b0"], ["c0", "long1", "long2"], ["long3", "long4"]]


def test_what_fails_harms_no_other_request():
    def recognize(pieces, word_times):
        if any(piece.path == "bad0" for piece in pieces):
            raise RuntimeError("out of memory")

    batcher = Batcher(recognize, batch_size=8)
    jobs = [make_job("a"), make_job("bad", 20), make_job("b", 3)]
    with batcher.changed:
        batcher.jobs.extend(jobs)
        batcher.changed.notify()
    assert jobs[0].done.result(10) is None
    assert jobs[2].done.result(10) is None
    with pytest.raises(RuntimeError, match="out of memory"):
        jobs[1].done.result(10)
    assert batcher.submit([Utterance("c", 1.0)], False).done.result(10) is None


def test_a_model_that_cannot_be_loaded_ends_the_service(projector, monkeypatch):
    def fail(args):
        raise InputError("no LLM")

    monkeypatch.setattr(serve.ModelArguments, "load_model", fail)
    with pytest.raises(InputError, match="^no LLM$"):
        serve.main(["--projector_model_path", projector, "--port", "0"])
    with pytest.raises(InputError, match="none cannot be read as a projector file"):
        serve.main(["--projector_model_path", "none"])


@pytest.fixture(scope="module")
def process(projector):
    """A service of its own process, which finds no ffmpeg, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tools.serve", "--projector_model_path", projector]
    command += ["--port", str(port), "--num_beams", "1", "--bf16", "False"]
    options = {"cwd": ROOT, "env": {**os.environ, "PATH": ""}, "text": True}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, **options)
    process.url = f"http://127.0.0.1:{port}"

    def is_ready():
        assert process.poll() is None, process.stderr.read()
        try:
            return httpx2.get(process.url + "/health").status_code == 200
        except httpx2.ConnectError:
            return False

    wait_until(is_ready, seconds=120)
    yield process
    process.kill()
    process.wait()


def test_the_openai_client_reads_all_formats(process, model, sounds):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{process.url}/v1", api_key="none")
    assert [known.id for known in client.models.list()] == ["slim-asr"]
    [text] = transcribe(model, sounds[-1:], 1)
    create = client.audio.transcriptions.create
    with open(sounds[-1], "rb") as file:
        assert create(file=file, model="whisper-1").text == text
        assert create(file=file, model="whisper-1", response_format="text") == f"{text}\n"
        options = {
            "response_format": "verbose_json",
            "timestamp_granularities": ["word", "segment"],
        }
        verbose = create(file=file, model="whisper-1", **options)
    assert (verbose.text, verbose.duration) == (text, 31)
    assert len(verbose.segments) == 4
    assert verbose.segments[1].start == verbose.segments[0].end
    assert verbose.words[0].start < verbose.words[-1].end
    with pytest.raises(openai.BadRequestError, match="notes.wav cannot be decoded as audio"):
        create(file=("notes.wav", b"no audio"), model="whisper-1")
    with pytest.raises(openai.APIStatusError, match="an upload may have 25 MB") as error:
        create(file=("big.wav", bytes(26_000_000)), model="whisper-1")
    assert error.value.status_code == 413


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_gets_the_text(process, model, sounds):
    command = ["curl", "-s", process.url + PATH, "-F", f"file=@{sounds[0]}", "-F", "model=x"]
    printed = subprocess.run(command, capture_output=True, check=True).stdout
    assert json.loads(printed) == {"text": transcribe(model, sounds[:1], 1)[0]}


def find_chromium():
    return shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(find_chromium() is None, reason="Chromium is not installed")
def test_the_page_shows_the_text_of_files_and_recordings(process, model, sounds, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    flags = ["--no-sandbox", "--use-fake-device-for-media-stream"]
    flags += ["--use-fake-ui-for-media-stream", f"--use-file-for-fake-audio-capture={sounds[-1]}"]
    notes = tmp_path / "notes.wav"
    notes.write_text("no audio")
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=find_chromium(), args=flags)
        page = browser.new_page()
        problems = []
        page.on("pageerror", lambda error: problems.append(error))
        page.goto(process.url)
        state, text = page.locator("#state"), page.locator("#text")
        page.locator("#file").set_input_files(sounds[-1])
        playwright.expect(state).to_have_text("long.wav, 31.0 s", timeout=30_000)
        assert text.text_content() == transcribe(model, sounds[-1:], 1)[0]
        assert page.locator("#segments tr").count() == 4
        page.locator("#file").set_input_files(notes)
        playwright.expect(text).to_have_class("error", timeout=30_000)
        assert text.text_content().startswith("notes.wav cannot be decoded as audio")
        page.get_by_role("button", name="Record").click()
        playwright.expect(page.locator("#hint")).to_have_text("recording ...")
        page.wait_for_timeout(1200)
        page.get_by_role("button", name="Stop").click()
        playwright.expect(state).to_contain_text("recording.wav, ", timeout=30_000)
        assert problems == []
        browser.close()


def test_sigterm_finishes_what_runs(process, sounds):
    upload = {"file": ("long.wav", sounds[-1].read_bytes())}
    health = f"{process.url}/health"
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx2.post, process.url + PATH, files=upload, timeout=60)
        wait_until(lambda: httpx2.get(health).json()["waiting"] == 1)
        process.send_signal(signal.SIGTERM)
        assert answer.result().json()["text"]
    assert process.wait(timeout=30) in (0, -signal.SIGTERM)
    assert "Traceback" not in process.stderr.read()
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(health)


def test_the_load_counts_what_comes_back(server, sounds, capsys):
    command = ["--url", server.url, "--wav", *map(str, sounds[:3]), "--pid", str(os.getpid())]
    load_test.main([*command, "--requests", "20", "--clients", "2"])
    head, _, row = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    cells = dict(zip(head, row))
    counts = [cells[name] for name in ("text, 200", "broken, 400", "lost", "other text")]
    assert counts == ["18", "2", "0", "0"]
    assert float(cells["audio s a second"]) > 0
    assert "MiB" in head[-1]
    server.args.max_waiting = 0
    load_test.main([*command, "--requests", "9", "--clients", "1"])
    assert "| 0 | 0 | 9 | 0 |" in capsys.readouterr().out
