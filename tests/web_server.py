"""A web server that gives one answer a path, and 404 elsewhere."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

PREFECT = {"/api/health": (200, "true"), "/api/admin/version": (200, '"3.8.7"')}
MLFLOW = {"/health": (200, "OK"), "/api/2.0/mlflow/experiments/search": (200, "{}")}


@contextmanager
def web_server(answers: Mapping[str, tuple[int, str]]) -> Iterator[str]:
    """Its address. An answer is a status and JSON; that of the path `*` is for all others."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, text = answers.get(self.path.split("?")[0], answers.get("*", (404, "{}")))
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def do_POST(self):
            self.do_GET()

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
