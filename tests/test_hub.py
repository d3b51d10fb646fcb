"""Pushing a slim folder: against a real HTTP server that speaks the Hub's protocol."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from conftest import LM_ROW, build, scattered_plan
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError

from hawada_peft import ExportFacts, save_slim, slim, verify_slim
from hawada_peft.shipping import push_to_hub


@dataclass
class Hub:
    """What the server was told."""

    endpoint: str = ""
    taken: bool = True
    created: list[dict[str, object]] = field(default_factory=list)
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on this machine; the tests are offline for everything else."""
    told = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            lines = [json.loads(line) for line in body.splitlines()]
            if self.path == "/api/repos/create":
                told.created.append(lines[0])
                answer: dict[str, object] = {"url": f"{told.endpoint}/{lines[0].get('organization')}/slim"}
            elif "/preupload/" in self.path:
                files = [{"path": file["path"], "uploadMode": "regular"} for file in lines[0]["files"]]
                answer = {"files": [file | {"shouldIgnore": False} for file in files]}
            elif "/commit/" in self.path:
                contents = {
                    line["value"]["path"]: base64.b64decode(line["value"]["content"])
                    for line in lines
                    if line["key"] == "file"
                }
                told.commits.append((self.path, contents))
                answer = {"success": True, "commitOid": "1", "commitUrl": f"{told.endpoint}/me/slim/commit/1"}
            else:
                answer = {}
            self.send_response(200 if told.taken else 403)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    told.endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield told
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = build(LM_ROW)
    plan = scattered_plan(model, LM_ROW.slim)
    save_slim(slim(model, plan), tmp_path / "slim", card=ExportFacts(plan=plan, repo_id="me/slim"))
    return tmp_path / "slim"


def test_a_folder_arrives_whole_in_one_commit(hub: Hub, folder: Path, tmp_path: Path) -> None:
    info = push_to_hub(folder, "me/slim", private=True, api=HfApi(endpoint=hub.endpoint, token="hf_x"))
    assert info.oid == "1"
    [created] = hub.created
    assert (created["name"], created["organization"]) == ("slim", "me")
    assert created.get("visibility") == "private" or created.get("private") is True  # by version of huggingface_hub
    [(path, contents)] = hub.commits
    assert path == "/api/models/me/slim/commit/main"
    assert contents == {file.name: file.read_bytes() for file in folder.iterdir()}
    arrived = tmp_path / "arrived"
    arrived.mkdir()
    for name, content in contents.items():
        (arrived / name).write_bytes(content)
    model = build(LM_ROW)
    assert verify_slim(arrived, reference=slim(model, scattered_plan(model, LM_ROW.slim))).max_difference == 0
    assert 'from_pretrained("me/slim")' in ModelCard.load(arrived / "README.md").text


def test_another_branch(hub: Hub, folder: Path) -> None:
    push_to_hub(folder, "me/slim", revision="half", api=HfApi(endpoint=hub.endpoint, token="hf_x"))
    assert hub.commits[0][0] == "/api/models/me/slim/commit/half"


def test_what_the_hub_refuses_is_raised(hub: Hub, folder: Path) -> None:
    hub.taken = False
    with pytest.raises(HfHubHTTPError, match="403"):
        push_to_hub(folder, "me/slim", api=HfApi(endpoint=hub.endpoint, token="hf_x"))
    assert hub.commits == []


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_an_incomplete_folder_is_not_sent(hub: Hub, folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing.rpartition(".")[2]):
        push_to_hub(folder, "me/slim", api=HfApi(endpoint=hub.endpoint, token="hf_x"))
    assert hub.created == []
