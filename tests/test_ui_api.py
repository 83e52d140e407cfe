"""The REST API: jobs started, listed, stopped and taken up again, and mistakes that are answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from studio import jobs
from studio.jobs import queue
from studio.ui import api
from studio.workspace import Workspace

DRAW = {"requests": [{"prompt": "a red fox", "steps": 2}]}


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setattr(jobs, "ensure_supervisor", lambda workspace: None)  # nobody works
    return Workspace(tmp_path / "home").create()


@pytest.fixture
def client(workspace: Workspace) -> TestClient:
    app = FastAPI()
    app.include_router(api.router(workspace), prefix="/api/v1")
    return TestClient(app)


def answer(response: Any) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return response.json()


def test_a_job_is_started_listed_stopped_and_taken_up_again(client: TestClient, workspace: Workspace) -> None:
    first = answer(client.post("/api/v1/jobs", json={"kind": "draw", "config": DRAW, "title": "fox"}))
    second = answer(client.post("/api/v1/generate", json=DRAW))
    assert (first["kind"], first["title"], first["state"]) == ("draw", "fox", "queued")
    listed = answer(client.get("/api/v1/jobs"))
    assert {one["id"] for one in listed["jobs"]} == {first["id"], second["id"]}
    assert listed["queue"] == [first["id"], second["id"]]
    assert answer(client.get(f"/api/v1/jobs/{first['id']}")) == first
    assert answer(client.post(f"/api/v1/jobs/{first['id']}/stop"))["state"] == "cancelled"
    assert [entry.id for entry in queue.waiting(workspace)] == [second["id"]]
    assert answer(client.post(f"/api/v1/jobs/{first['id']}/resume"))["state"] == "queued"
    assert [entry.id for entry in queue.waiting(workspace)] == [second["id"], first["id"]]


def test_files_have_addresses(client: TestClient, workspace: Workspace) -> None:
    id = answer(client.post("/api/v1/jobs", json={"kind": "draw", "config": DRAW}))["id"]
    picture = workspace.pictures / "fox.png"
    picture.write_bytes(b"picture")
    (workspace.jobs / id / "result.json").write_text('{"files": ["../../pictures/fox.png", "/etc/hosts"], "facts": {}}')
    assert answer(client.get(f"/api/v1/jobs/{id}"))["files"] == ["/files/pictures/fox.png"]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("jobs", {"kind": "drwa", "config": DRAW}, "there is no job of the kind 'drwa'. Did you mean draw"),
        ("jobs", {"kind": "draw", "config": {"requests": [{"prompt": "a fox", "steps": 0}]}}, "steps"),
        ("jobs/nothing/stop", {}, "there is no job 'nothing'"),
        ("jobs/..%2f..%2fetc/resume", {}, ""),
    ],
)
def test_mistakes_are_answers(path: str, body: dict[str, Any], message: str, client: TestClient) -> None:
    response = client.post(f"/api/v1/{path}", json=body)
    assert response.status_code in (404, 422)
    assert message in response.json()["detail"]
