"""A server that does everything wrong, by one script per path, and the names of what it gave."""

import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

JPEG = b"\xff\xd8\xff\xe0"  # that it begins so is all that downloading asks of an image
BODY = JPEG + bytes(i * i % 251 for i in range(300_000 - len(JPEG)))
SHA256 = hashlib.sha256(BODY).hexdigest()


class Server(ThreadingHTTPServer):
    """Plays one script per path: a list of what each request in turn meets."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.scripts = {}
        self.requests = []
        self.together = self.most_together = 0
        self.lock = threading.Lock()

    def url(self, path, *script):
        self.scripts[f"/{path.partition('?')[0]}"] = list(script)
        return f"http://127.0.0.1:{self.server_port}/{path}"

    def ranges(self, path):
        return [headers.get("Range") for name, headers in self.requests if name == f"/{path}"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        server, path = self.server, self.path.partition("?")[0]
        with server.lock:
            server.requests.append((path, dict(self.headers)))
            script = server.scripts[path]
            act = script.pop(0) if len(script) > 1 else script[0]
            server.together += 1
            server.most_together = max(server.most_together, server.together)
        try:
            act(self)
        finally:
            with server.lock:
                server.together -= 1


def status(code, **headers):
    def act(handler):
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return act


def serve(body=BODY, stop_after=None, ranges=True, etag='"one"', before=None, **headers):
    """The file; ``stop_after`` that many bytes of the answer the connection breaks.

    ``before`` is called before its first byte.
    """

    def act(handler):
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        same = handler.headers.get("If-Range") in (None, etag, headers.get("Last_Modified"))
        start = int(asked[1]) if asked and ranges and same else 0
        if start >= len(body) > 0:
            status(416, Content_Range=f"bytes */{len(body)}")(handler)
            return
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if etag:
            handler.send_header("ETag", etag)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body) - start))
        handler.end_headers()
        if before is not None:
            before()
        end = len(body) if stop_after is None else min(len(body), start + stop_after)
        handler.wfile.write(body[start:end])
        handler.wfile.flush()
        if end < len(body):
            handler.close_connection = True
            handler.connection.close()

    return act


def names(folder):
    return sorted(path.name for path in folder.iterdir())
