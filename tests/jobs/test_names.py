"""Names that lead nowhere are refused at once, and with a guess."""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from blip2_hf.jobs.names import check_data_name, check_file, check_folder, check_model_name


# What a Hub answers about a repository: status, its own error code
ANSWERS = {
    "me/there": (200, None),
    "me/adapters": (404, "EntryNotFound"),
    "me/missing": (401, "RepoNotFound"),
    "me/gated": (403, "GatedRepo"),
    "me/ill": (500, None),
}


class _Hub(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.server.asked.append(self.path)
        name = "/".join(self.path.removeprefix("/datasets").split("/")[1:3])
        status, code = ANSWERS[name]
        self.send_response(status)
        if code is not None:
            self.send_header("X-Error-Code", code)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        """Nobody reads it."""


@pytest.fixture
def hub(monkeypatch):
    """A Hub on loopback: `hub.asked` are the requests."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.asked = []
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    use_hub(monkeypatch, server.server_address[1])
    yield server
    server.shutdown()
    server.server_close()


def use_hub(monkeypatch, port: int):
    url = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with models and data, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    for name in ("models/captioner", "run/checkpoint-5", "run/checkpoint-10", "photos", "empty", "me"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("models/captioner", "run/checkpoint-5", "run/checkpoint-10"):
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "photos" / "a.jpg").write_text("")
    (tmp_path / "rows.csv").write_text("")
    return tmp_path


@pytest.mark.parametrize("check", [check_model_name, check_data_name])
def test_names_of_what_is_on_the_hub(hub, folder, monkeypatch, check):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    (folder / "me").rmdir()
    check("me/there")
    check("me/adapters")
    kind = "model" if check is check_model_name else "dataset"
    with pytest.raises(
        FileNotFoundError, match=f"no folder me/missing here, and no such {kind} on the Hub, or a priva"
    ):
        check("me/missing")
    with pytest.raises(PermissionError, match="me/gated is gated: ask for access"):
        check("me/gated")
    with pytest.raises(ConnectionError, match="the Hub can't be asked .*500"):
        check("me/ill")
    assert len(hub.asked) == 5  # without retries


def test_what_is_in_the_cache_is_not_asked_for(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    for name in ("models--me--missing", "datasets--me--missing"):
        (folder / "cache" / name / "snapshots").mkdir(parents=True)
    (folder / "me").rmdir()
    check_model_name("me/missing")
    check_data_name("me/missing:validation")
    assert hub.asked == []


@pytest.mark.parametrize(("check", "name"), [(check_model_name, "no/such"), (check_data_name, "no/such:train")])
def test_a_hub_that_is_not_there_costs_no_time(folder, monkeypatch, check, name):
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and nobody listens
        use_hub(monkeypatch, closed.getsockname()[1])
        with pytest.raises(ConnectionError, match="no folder no/such here, and the Hub can't be asked"):
            check(name)
    assert slept == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./modles/captioner", "There is no folder ./modles/captioner. Did you mean models/captioner?"),
        ("models/captoiner/", "There is no folder models/captoiner/. Did you mean models/captioner?"),
        ("~/captioner", "There is no folder ~/captioner."),
        (r"models\captioner", "There is no folder"),
        ("models/a/b", "There is no folder models/a/b."),
        ("my captioner", "There is no folder my captioner."),
        ("model.pth", "There is no file model.pth."),
        ("", "An empty name was given"),
        ("rows.csv", "rows.csv is a file: the folder of a model, or an id on the Hub, was expected."),
        ("photos", "The folder photos holds no model, because it has no config.json."),
        ("run", "no config.json. Did you mean run/checkpoint-"),
        ("models/captioner/config.json", "config.json is a file: .* Did you mean models/captioner?"),
    ],
)
def test_paths_of_models_are_never_asked_for(hub, folder, name, message):
    with pytest.raises((OSError, ValueError), match=message.replace("?", r"\?").replace("\\c", r"\\c")):
        check_model_name(name)
    assert hub.asked == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("phtos", "There is no file or folder phtos. Did you mean photos?"),
        ("photos/b.csv", "There is no file photos/b.csv."),
        ("me/there", "There is no file or folder me/there."),  # because there is a folder `me`
        ("a/b/c", "There is no file or folder a/b/c."),
        ("*.tar", r"no file is called \*.tar."),
        ("empty", "The folder empty is empty."),
        ("", "An empty name was given"),
    ],
)
def test_paths_of_data_are_never_asked_for(hub, folder, name, message):
    with pytest.raises((OSError, ValueError), match=message.replace("?", r"\?")):
        check_data_name(name)
    assert hub.asked == []


def test_what_is_there_is_fine(hub, folder):
    for name in ("models/captioner", folder / "run" / "checkpoint-5"):
        check_model_name(name)
    for name in ("photos", "photos:train", "rows.csv", "*.csv", "http://example.com/a.parquet"):
        check_data_name(name)
    check_folder("photos")
    check_file("rows.csv")
    assert hub.asked == []


def test_files_and_folders_are_told_apart(folder):
    with pytest.raises(IsADirectoryError, match="photos is a folder: a file was expected"):
        check_file("photos")
    with pytest.raises(NotADirectoryError, match="rows.csv is a file: a folder was expected"):
        check_folder("rows.csv")


def test_adapters_lead_to_their_model(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    config = folder / "photos" / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": "models/captioner"}))
    check_model_name("photos")
    config.write_text(json.dumps({"base_model_name_or_path": "/no/such/folder"}))
    with pytest.raises(ValueError, match="photos holds adapters of /no/such/folder, which is not there"):
        check_model_name("photos")
    (folder / "me").rmdir()
    config.write_text(json.dumps({"base_model_name_or_path": "me/missing"}))
    with pytest.raises(ValueError, match="photos holds adapters of me/missing, which can't be loaded. .*on the Hub"):
        check_model_name("photos")
