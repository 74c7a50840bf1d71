"""Projectors on the Hub: a server on this machine that speaks as much of its API as is needed."""

import base64
import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub.constants
import pytest
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_train import equal, run

import train
from command import InputError
from loading import find_projector, load, read_config
from tools import upload

TABLE = "| beam | WER % |\n| --- | --- |\n| 5 | 9.87 |\nmetric: WER; normaliser: english\n"


class FakeHub(BaseHTTPRequestHandler):
    """Repositories in `files`, by user/name and by the file."""

    files: dict[str, dict[str, bytes]]

    def do_HEAD(self):
        user, name, _, _, file = self.path.lstrip("/").split("/", 4)
        content = self.files.get(f"{user}/{name}", {}).get(file)
        if f"{user}/{name}" not in self.files:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif content is None:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            headers = {"X-Repo-Commit": "c" * 40, "ETag": f'"{len(content)}"'}
            self.answer(200, content, headers)

    do_GET = do_HEAD

    def do_POST(self):
        repository = f"http://{self.headers['Host']}/user/name"
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/validate-yaml":
            self.reply(errors=[], warnings=[])
        elif self.path == "/api/repos/create":
            self.files.setdefault("user/name", {})
            self.reply(url=repository)
        elif self.path == "/api/models/user/name/preupload/main":
            files = [{**x, "uploadMode": "regular"} for x in json.loads(body)["files"]]
            self.reply(files=[{**x, "shouldIgnore": False} for x in files])
        elif self.path == "/api/models/user/name/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    content = base64.b64decode(value["content"])
                    self.files["user/name"][value["path"]] = content
            self.reply(commitUrl=f"{repository}/commit/c", commitOid="c", hookOutput="")
        else:
            self.answer(404, b"", {})

    def reply(self, **answer):
        self.answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def answer(self, status, content, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No network, an empty cache, and a folder to work in without files."""
    monkeypatch.chdir(tmp_path)
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", "hf_fake")
    return tmp_path / "cache"


@pytest.fixture
def hub(offline, monkeypatch):
    """The repositories of a Hub that is there."""
    handler = type("Handler", (FakeHub,), {"files": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield handler.files
    server.shutdown()
    server.server_close()


def test_what_is_uploaded_loads_by_its_name_and_again_without_network(
    projector, hub, monkeypatch, capsys
):
    Path("table.md").write_text(TABLE)
    flags = ["--repo_id", "user/name", "--results_path", "table.md", "--language", "en", "zh"]
    upload.main(["--projector_model_path", projector, *flags])
    assert capsys.readouterr().out.endswith("/user/name/commit/c\n")
    content = Path(projector).read_bytes()
    assert hub["user/name"]["model.safetensors"] == content
    hub["other/name"] = {"model.safetensors": hub.pop("user/name")["model.safetensors"]}
    upload.main(["--projector_model_path", "other/name", *flags])
    assert hub["user/name"]["model.safetensors"] == content
    hub["user/name"]["best/beam5.safetensors"] = content
    assert load("user/name").speech_config == read_config("user/name") == read_config(projector)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.clear()
    assert Path(find_projector("user/name")).read_bytes() == content


def test_a_file_of_a_repository_and_what_it_lacks(hub):
    hub["user/name"] = {"best/beam5.safetensors": b"5"}
    assert Path(find_projector("user/name/best/beam5.safetensors")).read_bytes() == b"5"
    with pytest.raises(InputError, match="model.safetensors of user/name from the Hub: 404"):
        find_projector("user/name")
    with pytest.raises(InputError, match="of other/name from the Hub: .*Repository Not Found"):
        find_projector("other/name")


def test_training_goes_on_from_a_name_on_the_hub(paths, projector, hub):
    hub["user/name"] = {"model.safetensors": Path(projector).read_bytes()}
    last = run(
        paths, Path("out"), "--projector_model_path user/name --max_steps 1 --learning_rate 0"
    )
    assert equal(last, load_file(projector))


def test_a_cache_of_the_hub_serves_without_network(projector, offline):
    snapshot = offline / "models--user--name" / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(projector)
    refs = offline / "models--user--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("c" * 40)
    assert find_projector("user/name") == str(snapshot / "model.safetensors")


def test_without_network_there_is_one_line(projector, offline, monkeypatch):
    line = (
        "--projector_model_path: no such file: user/name; nor is model.safetensors of user/name "
        "from the Hub: it cannot be reached, and its cache has no such file"
    )
    with pytest.raises(InputError) as error:
        load("user/name")
    assert str(error.value) == line
    flags = ["--projector_model_path", "user/name", "--output_dir", "out", "--data_path", "m.jsonl"]
    models = ["--llm_model_name_or_path", "qwen", "--whisper_model_name_or_path", "tiny"]
    with pytest.raises(InputError) as error:
        train.main([*flags, *models])
    assert str(error.value) == line
    with pytest.raises(InputError, match="the Hub did not take user/name: .*hf auth login"):
        upload.main(["--projector_model_path", projector, "--repo_id", "user/name"])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    address = "http://127.0.0.1:1"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/x")
    begin = time.perf_counter()
    with pytest.raises(InputError) as error:
        load("user/name")
    assert str(error.value) == line
    assert time.perf_counter() - begin < 5
    with pytest.raises(InputError, match="the Hub did not take user/name: .*refused"):
        upload.main(["--projector_model_path", projector, "--repo_id", "user/name"])


@pytest.mark.parametrize(
    "path", ["model.safetensors", "exp/model.safetensors", "/exp/name", "./exp/name", "user/name"]
)
def test_what_is_a_path_is_not_looked_for_on_the_hub(offline, path):
    Path("user/name").mkdir(parents=True)
    assert find_projector(path) == path


def test_the_card_has_the_settings_and_the_results(projector, offline):
    Path("table.md").write_text(TABLE)
    with safe_open(projector, "pt") as file:
        metadata = file.metadata()
    metadata |= {"llm_model_name_or_path": "Qwen/Qwen2-1.5B", "whisper_model_name_or_path": "tiny"}
    save_file(load_file(projector), "model.safetensors", metadata)
    flags = ["--repo_id", "user/name", "--card_path", "README.md"]
    upload.main(["--projector_model_path", "model.safetensors", *flags])
    card = ModelCard.load("README.md")
    assert card.data.base_model == ["Qwen/Qwen2-1.5B", "openai/whisper-tiny"]
    assert card.data.pipeline_tag == "automatic-speech-recognition"
    assert "--projector_model_path user/name --wav" in card.text
    assert "| prompt | Repeat word for word: |" in card.text
    assert "None yet." in card.text
    Path("Qwen/Qwen2-1.5B").mkdir(parents=True)  # the name is that of a folder
    upload.main(["--projector_model_path", "model.safetensors", *flags])
    assert ModelCard.load("README.md").data.base_model == ["openai/whisper-tiny"]
    results = ["--results_path", "table.md"]
    upload.main(["--projector_model_path", projector, *flags, *results])
    card = ModelCard.load("README.md")
    assert card.data.base_model is None
    # the LLM and the encoder are files here, which others give by flags
    assert "name --llm_model_name_or_path qwen --whisper_model_name_or_path tiny.pt" in card.text
    assert TABLE in card.text


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--repo_id", "name"], "--repo_id must be user/name, got name"),
        (["--repo_id", "a/b", "--results_path", "no.md"], "--results_path: cannot read no.md"),
        (["--repo_id", "a/b", "--results_path", "m.md"], "no Markdown table in m.md"),
        (["--repo_id", "a/b", "--card_path", "no/card.md"], "--card_path: cannot write no/card.md"),
    ],
)
def test_what_makes_no_card_is_refused(projector, offline, flags, reason):
    Path("m.md").write_text("WER 9")
    with pytest.raises(InputError, match=reason):
        upload.main(["--projector_model_path", projector, *flags])
