"""A server that answers what W&B's runs, agents and workspaces ask for, as far as ours do, and can be made to fail."""

import gzip
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer(ThreadingHTTPServer):
    """Collects what it is sent. `mode`: ok, error (500), deny (403), hang (never an answer), forbid (no workspaces).

    Attributes:
        runs: the history lines of each run, by its id.
        configs: the configuration of each run, by its id.
        sweep: the configuration of the one sweep there is.
        commands: what its agent is told next, each with what says, of what runs, whether it is time.
        views: the workspaces that were saved.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.mode = "ok"
        self.refusal = 403
        self.runs: dict[str, list[dict[str, Any]]] = {}
        self.configs: dict[str, dict[str, Any]] = {}
        self.sweep: dict[str, Any] = {}
        self.commands: list[tuple[Callable[[dict[str, bool]], bool], dict[str, Any]]] = []
        self.views: list[dict[str, Any]] = []
        self.stop_hanging = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def history(self) -> list[dict[str, Any]]:
        """The lines of all runs."""
        return [line for lines in self.runs.values() for line in lines]

    def next_commands(self, running: dict[str, bool]) -> list[dict[str, Any]]:
        """What the agent is to do now."""
        return [self.commands.pop(0)[1]] if self.commands and self.commands[0][0](running) else []

    @property
    def environment(self) -> dict[str, str]:
        """What makes a run talk to this server."""
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.server_address[1]}", "WANDB_API_KEY": "a" * 40}

    def fail(self, how: str) -> None:
        """From now on; `refuse` closes the door."""
        self.mode = how
        if how == "refuse":
            self.shutdown()
            self.server_close()

    def handle_error(self, request, client_address) -> None:
        """A client that went away is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        """Quiet."""

    def do_POST(self) -> None:
        server: WandbServer = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if server.mode == "hang":
            server.stop_hanging.wait(120)
            return
        if server.mode not in ("ok", "forbid"):
            return self._answer({"error": "out of order"}, 403 if server.mode == "deny" else 500)
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.path.startswith("/graphql"):
            asked = json.loads(body)
            if server.mode == "forbid" and "UpsertView" in asked["query"]:
                return self._answer({"data": None, "errors": [{"message": "permission denied"}]}, server.refusal)
            return self._answer({"data": self._data(asked)})
        if self.path.endswith("file_stream"):
            for name, part in (json.loads(body).get("files") or {}).items():
                if "history" in name:
                    lines = server.runs.setdefault(self.path.split("/")[-2], [])
                    lines[part["offset"] :] = [json.loads(line) for line in part["content"]]
        self._answer({})

    do_GET = do_PUT = do_POST

    def _data(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The answer to a GraphQL query, with what the history holds for a run that goes on."""
        server: WandbServer = self.server
        query, variables = asked["query"], asked.get("variables", {})
        if "upsertBucket" in query:
            bucket = {"id": "1", "name": variables.get("name"), "displayName": "x", "config": "{}", "sweepName": None}
            project = {"id": "2", "name": variables.get("project"), "entity": {"id": "3", "name": "me"}}
            lines = len(server.runs.setdefault(variables.get("name"), []))
            server.configs[variables["name"]] = json.loads(variables.get("config") or "{}")
            return {
                "upsertBucket": {
                    "bucket": {**bucket, "project": project, "historyLineCount": lines},
                    "inserted": not lines,
                }
            }
        if "createRunFiles" in query:
            files = [
                {"name": name, "uploadUrl": f"{server.environment['WANDB_BASE_URL']}/up"} for name in variables["files"]
            ]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        if "iewer" in query:
            return {"viewer": {"id": "4", "username": "me", "entity": "me", "flags": "{}", "teams": {"edges": []}}}
        if "ResumeStatus" in query or "historyTail" in query:
            return {
                "model": {
                    "id": "2",
                    "name": "medqa",
                    "entity": {"id": "3", "name": "me"},
                    "bucket": self._resumed(variables),
                }
            }
        if "SweepWithRuns" in query:
            sweep = {"id": "5", "name": variables["sweep"], "config": json.dumps(server.sweep), "runs": {"edges": []}}
            return {"project": {"sweep": sweep}}
        if "CreateAgent" in query:
            return {"createAgent": {"agent": {"id": "6"}}}
        if "Heartbeat" in query:
            commands = server.next_commands(json.loads(variables["runState"]))
            return {"agentHeartbeat": {"agent": {"id": "6"}, "commands": json.dumps(commands)}}
        if "UpsertView" in query:
            server.views.append(variables)
            return {"upsertView": {"view": {"id": "7", "name": variables["name"]}, "inserted": True}}
        return {"serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None, "features": []}}

    def _resumed(self, variables: dict[str, Any]) -> dict[str, Any] | None:
        """What is known of the run, None for a new one."""
        history = self.server.runs.get(variables.get("name"), [])
        if not history:
            return None
        last = json.dumps([json.dumps(history[-1])])
        summary = {key: value for line in history for key, value in line.items()}
        return {
            "id": "1", "name": "x", "historyLineCount": len(history), "eventsLineCount": 0, "logLineCount": 0,
            "historyTail": last, "eventsTail": "[]", "summaryMetrics": json.dumps(summary), "config": "{}", "tags": [],
            "wandbConfig": json.dumps({"t": {"1": [1]}}),  # its sign that a run was begun
        }  # fmt: skip

    def _answer(self, content: dict[str, Any], code: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
