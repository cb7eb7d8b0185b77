"""A bucket at the end of a long wire, for tests and benchmarks: a folder on disk served as S3 does, each answer some
milliseconds late, in a process of its own. It reads, lists, removes, and writes objects that memory holds, with
conditions that hold among any number of clients at once; moto's threads look first and write then.

    with Served(folder, latency_s=0.03) as far:  # the folder's files are s3://far/...
        ...
        print(far.counts())
"""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

BUCKET = "far"
NAMES = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}


class Served:
    """A folder as s3://far, until the block ends.

    Args:
        folder: whose files are the bucket's objects.
        latency_s: that each answer is late by.
    """

    def __init__(self, folder: str | Path, latency_s: float = 0.0):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen([sys.executable, __file__, str(folder), str(port), str(latency_s)])

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find it."""
        return NAMES | {"AWS_ENDPOINT_URL": self.url}

    def counts(self) -> dict[str, int]:
        """Requests so far by kind (GET, HEAD, LIST), answers that were refused (FAILED), bytes sent (BYTES), and the
        most that were waited for at a time (MOST); begins at 0 again."""
        return json.loads(self._say("count"))

    def fail(self, status: int, seconds: float, code: str = "SlowDown") -> None:
        """For some time all is answered with an error."""
        self._say(f"fail?status={status}&seconds={seconds}&code={code}")

    def take_conditions(self, how: str) -> None:
        """What becomes of If-Match and If-None-Match: "kept", "ignored", or "501", as stores do that lack them."""
        self._say(f"conditions?how={how}")

    def _say(self, what: str) -> bytes:
        with urllib.request.urlopen(f"{self.url}/_{what}") as answer:
            return answer.read()

    def __enter__(self) -> "Served":
        for _ in range(200):
            try:
                self.counts()
                return self
            except OSError:
                time.sleep(0.05)
        raise TimeoutError("the served folder does not answer")

    def __exit__(self, *_) -> None:
        self.process.terminate()
        self.process.wait()


# -- the process ------------------------------------------------------------------------------------------------------


def _tag(stat: os.stat_result) -> str:
    return f'"{stat.st_mtime_ns}-{stat.st_size}"'


def _store(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.part")
    aside.write_bytes(content)
    os.utime(aside, ns=(time.time_ns(),) * 2)  # the kernel's own ticks are too coarse to tell versions apart
    aside.replace(path)


class Handler(BaseHTTPRequestHandler):
    """One connection, which stays open."""

    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    folder, latency_s, failing = Path(), 0.0, (200, 0.0, "")
    writing, conditions = threading.Lock(), "kept"
    awaited, waiting = threading.Lock(), 0
    parts: ClassVar[dict[str, dict[int, bytes]]] = {}  # of objects that come in parts, one upload each at a time
    counted = dict.fromkeys(("GET", "HEAD", "LIST", "FAILED", "BYTES", "MOST"), 0)

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if parts.path == "/_count":
            content = json.dumps(self.counted).encode()
            self.counted |= dict.fromkeys(self.counted, 0)
            return self._answer(200, content)
        if parts.path == "/_fail":
            Handler.failing = int(query["status"]), time.monotonic() + float(query["seconds"]), query["code"]
            return self._answer(200, b"")
        if parts.path == "/_conditions":
            Handler.conditions = query["how"]
            return self._answer(200, b"")
        with self.awaited:
            Handler.waiting += 1
            self.counted["MOST"] = max(self.counted["MOST"], self.waiting)
        time.sleep(self.latency_s)
        with self.awaited:
            Handler.waiting -= 1
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        status, until, code = self.failing
        if time.monotonic() < until:
            self.counted["FAILED"] += 1
            return self._fault(status, code)
        if bucket != BUCKET:
            return self._fault(404, "NoSuchBucket")
        if "list-type" in query:
            self.counted["LIST"] += 1
            return self._list(query.get("prefix", ""), query.get("delimiter", ""))
        self.counted[self.command] += 1
        return self._send(self.folder / key)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(self.latency_s)
        key, query = self._asked()
        if "partNumber" in query:
            self.parts[key][int(query["partNumber"])] = content
            return self._head(200, 0, {"ETag": '"part"'})
        path = self.folder / key
        asked = self.headers if self.conditions != "ignored" else {}
        if self.conditions == "501" and (asked.get("If-Match") or asked.get("If-None-Match")):
            return self._fault(501, "NotImplemented")
        with self.writing:
            there, wanted = path.exists(), asked.get("If-Match")
            if (there and asked.get("If-None-Match")) or (wanted and there and wanted != _tag(path.stat())):
                return self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
            if wanted and not there:
                return self._fault(404, "NoSuchKey")
            _store(path, content)
            self._head(200, 0, {"ETag": _tag(path.stat())})
        return None

    def do_POST(self) -> None:
        """Begins or ends an object that comes in parts, or removes the objects that a list names."""
        content = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        time.sleep(self.latency_s)
        key, query = self._asked()
        if "uploads" in query:
            self.parts[key] = {}
            return self._answer(200, b"<R><Bucket>far</Bucket><Key>k</Key><UploadId>1</UploadId></R>")
        if "uploadId" in query:
            with self.writing:
                _store(self.folder / key, b"".join(part for _, part in sorted(self.parts.pop(key).items())))
            return self._answer(200, b"<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>")
        keys = [unescape(key) for key in re.findall(r"<Key>(.*?)</Key>", content)]
        with self.writing:
            for key in keys:
                (self.folder / key).unlink(missing_ok=True)
        done = "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
        return self._answer(200, f"<DeleteResult>{done}</DeleteResult>".encode())

    def _asked(self) -> tuple[str, dict[str, str]]:
        """Key and options of a request."""
        parts = urlsplit(self.path)
        query = parse_qs(parts.query, keep_blank_values=True)
        return unquote(parts.path).lstrip("/").partition("/")[2], {name: values[0] for name, values in query.items()}

    def _send(self, path: Path) -> None:
        if not path.is_file():
            self._fault(404, "NoSuchKey")
            return
        with path.open("rb") as file:
            size, asked = os.fstat(file.fileno()).st_size, self.headers.get("Range", "").removeprefix("bytes=")
            begin, _, end = asked.partition("-")
            if asked and not begin:
                start, stop = max(0, size - int(end)), size
            else:
                start, stop = int(begin or 0), min(size, int(end) + 1) if end else size
            if asked and start >= size:
                self._fault(416, "InvalidRange")
                return
            headers = {"ETag": _tag(os.fstat(file.fileno()))}
            headers["Last-Modified"] = self.date_time_string(int(path.stat().st_mtime))
            if asked:
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
            self._head(206 if asked else 200, stop - start, headers)
            while self.command == "GET" and start < stop:
                start += os.sendfile(self.connection.fileno(), file.fileno(), start, stop - start)

    def _list(self, prefix: str, delimiter: str) -> None:
        """All in one page."""
        objects, folders = [], set()
        for path in sorted(self.folder.rglob("*")):
            key = path.relative_to(self.folder).as_posix()
            if not path.is_file() or not key.startswith(prefix):
                continue
            inside = key[len(prefix) :]
            if delimiter and delimiter in inside:
                folders.add(prefix + inside.partition(delimiter)[0] + delimiter)
            else:
                modified = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(path.stat().st_mtime))
                objects.append(
                    f"<Contents><Key>{escape(key)}</Key><Size>{path.stat().st_size}</Size>"
                    f"<LastModified>{modified}</LastModified><ETag>x</ETag></Contents>"
                )
        below = [f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in sorted(folders)]
        text = f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(objects + below)}</ListBucketResult>"
        self._answer(200, text.encode())

    def _fault(self, status: int, code: str) -> None:
        self._answer(status, f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode())

    def _answer(self, status: int, content: bytes) -> None:
        self._head(status, len(content), {})
        if self.command != "HEAD":
            self.wfile.write(content)

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response_only(status)
        for name, value in ({"Content-Length": str(length)} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET" and not self.path.startswith("/_"):
            self.counted["BYTES"] += length


class Server(ThreadingHTTPServer):
    """One thread per connection."""

    request_queue_size = 256

    def handle_error(self, *_) -> None:
        """A client that has gone away is none of its business."""


if __name__ == "__main__":
    Handler.folder, Handler.latency_s = Path(sys.argv[1]), float(sys.argv[3])
    Server(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
