"""A file server with ranges: ``origin.py PORT FOLDER LOG``; the log gets each request's path and range."""

import contextlib
import http.server
import os
import sys


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the files of one folder."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        """Answer a whole file or the end of one."""
        asked = self.headers.get("Range")
        with open(sys.argv[3], "a") as log:
            log.write(f"{self.path} {asked}\n")
        path = os.path.join(sys.argv[2], os.path.basename(self.path))
        if not os.path.exists(path):
            self.send_error(404)
            return
        with open(path, "rb") as stream:
            content = stream.read()
        start = int(asked[6:-1]) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(content) - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(content[start:])

    def log_message(self, *_):
        """Say nothing."""


http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
