"""A server that answers what a W&B run asks for, as far as ours do, and can be made to fail in its middle."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer(ThreadingHTTPServer):
    """Collects the history lines it is sent. `mode`: ok, error (500), deny (403), hang (never an answer)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.mode = "ok"
        self.history: list[dict[str, Any]] = []
        self.stop_hanging = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

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
        if server.mode != "ok":
            return self._answer({"error": "out of order"}, 403 if server.mode == "deny" else 500)
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.path.startswith("/graphql"):
            return self._answer({"data": self._data(json.loads(body))})
        if self.path.endswith("file_stream"):
            for name, part in (json.loads(body).get("files") or {}).items():
                if "history" in name:
                    server.history[part["offset"] :] = [json.loads(line) for line in part["content"]]
        self._answer({})

    do_GET = do_PUT = do_POST

    def _data(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The answer to a GraphQL query, with what the history holds for a run that goes on."""
        server: WandbServer = self.server
        query, variables = asked["query"], asked.get("variables", {})
        if "upsertBucket" in query:
            bucket = {"id": "1", "name": variables.get("name"), "displayName": "x", "config": "{}", "sweepName": None}
            project = {"id": "2", "name": variables.get("project"), "entity": {"id": "3", "name": "me"}}
            lines = len(server.history)
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
                "model": {"id": "2", "name": "medqa", "entity": {"id": "3", "name": "me"}, "bucket": self._resumed()}
            }
        return {"serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None, "features": []}}

    def _resumed(self) -> dict[str, Any] | None:
        """What is known of the run, None for a new one."""
        history = self.server.history
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
