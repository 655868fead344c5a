#!/usr/bin/env python3
"""Models by name, beside Python's own tools: what `pull` writes they find, and what they write is found.

Starts a hub of its own on 127.0.0.1 that speaks as much of Hugging Face's and ModelScope's protocols as
`huggingface_hub` and `modelscope` ask for, with `model/tiny` as its only model, and checks in fresh caches:

1. `pull`, then `snapshot_download(local_files_only=True)` gives the same folder, and a second `snapshot_download`
   against the hub fetches no weights;
2. `snapshot_download`, then `infer --model ID` answers without a network and `pull` fetches no weights;
3. over TLS, the certificate in SSL_CERT_FILE is trusted and an unknown one is not.

    pip install 'huggingface_hub==2.4.0' 'modelscope==1.40.2'
    tests/clients/hub.py target/release/xray-qwen3vl
"""
import hashlib
import http.server
import json
import os
import pathlib
import shutil
import ssl
import subprocess
import sys
import tempfile
import threading
import urllib.parse

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = ROOT / "model/tiny"
FILES = {path.name: path.read_bytes() for path in TINY.iterdir()}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ID = "test/tiny.v1"
WEIGHTS = "model.safetensors"


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def git_hash(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    seen = []

    def log_message(self, *_):
        pass

    def send(self, body, status=200, headers=()):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value, status=200):
        self.send(json.dumps(value).encode(), status, [("Content-Type", "application/json")])

    def file(self, name, headers=()):
        data = FILES[name]
        asked = self.headers.get("Range")
        if not asked:
            return self.send(data, 200, headers)
        first, last = asked.removeprefix("bytes=").split("-")
        first, last = int(first), int(last or len(data) - 1)
        part = ("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send(data[first : last + 1], 206, [*headers, part])

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        query = {key: values[0] for key, values in urllib.parse.parse_qs(url.query).items()}
        path = urllib.parse.unquote(url.path)
        self.seen.append((self.command, self.path))
        large = lambda name: name.endswith(".safetensors")
        if path.startswith(f"/api/models/{ID}/tree/"):
            files = [
                {"type": "file", "path": name, "size": len(data), "oid": "0"*40 if large(name) else git_hash(data)}
                | ({"lfs": {"oid": sha256(data), "size": len(data), "pointerSize": 130}} if large(name) else {})
                for name, data in FILES.items()
            ]
            return self.json(files)
        if path.startswith(f"/api/models/{ID}"):
            files = [
                {"rfilename": name, "size": len(data), "blobId": "0"*40 if large(name) else git_hash(data)}
                | ({"lfs": {"sha256": sha256(data), "size": len(data), "pointerSize": 130}} if large(name) else {})
                for name, data in FILES.items()
            ]
            return self.json({"id": ID, "modelId": ID, "sha": COMMIT, "siblings": files, "private": False})
        if path.startswith(f"/{ID}/resolve/"):
            name = path.rsplit("/", 1)[1]
            if name not in FILES:
                return self.send(b"", 404, [("X-Error-Code", "EntryNotFound"), ("X-Repo-Commit", COMMIT)])
            data = FILES[name]
            etag = sha256(data) if large(name) else git_hash(data)
            headers = [("ETag", f'"{etag}"'), ("X-Repo-Commit", COMMIT)]
            if large(name):
                headers += [
                    ("X-Linked-Etag", f'"{etag}"'),
                    ("X-Linked-Size", str(len(data))),
                    ("Location", f"{CDN}/cdn/{name}"),
                ]
                return self.send(b"", 302, headers)
            return self.file(name, headers)
        if path.startswith("/cdn/"):
            return self.file(path.rsplit("/", 1)[1])
        if path == f"/api/v1/models/{ID}/repo/files":
            files = [
                {"Path": name, "Name": name, "Type": "blob", "Size": len(data), "Sha256": sha256(data), "IsLFS": large(name)}
                for name, data in FILES.items()
            ]
            return self.json({"Code": 200, "Success": True, "Data": {"Files": files}})
        if path == f"/api/v1/models/{ID}/repo":
            return self.file(query["FilePath"])
        if path == f"/api/v1/models/{ID}/revisions":
            revisions = {"Branches": [{"Revision": "master"}], "Tags": []}
            return self.json({"Code": 200, "Success": True, "Data": {"RevisionMap": revisions}})
        if path == f"/api/v1/models/{ID}":
            return self.json({"Code": 200, "Success": True, "Data": {"Name": "tiny", "Path": "test"}})
        self.json({"Code": 404, "Message": f"no {path}", "Success": False}, 404)


def start(tls=None):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*tls)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    scheme, host = ("https", "localhost") if tls else ("http", "127.0.0.1")
    return f"{scheme}://{host}:{server.server_port}"


def environment(home, url, **more):
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    hub = {"HOME": str(home), "HF_ENDPOINT": url, "MODELSCOPE_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1"}
    return kept | hub | more


def program(home, url, *args, **more):
    done = subprocess.run(
        [PROGRAM, *args], env=environment(home, url, **more), cwd=home, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{args}: {done.stderr}"
    return done.stdout.strip()


def python(home, url, code, **more):
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(home, url, **more), cwd=home, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{code}: {done.stderr}"
    return done.stdout.strip().splitlines()[-1]


def weights_fetched():
    """How often weights were asked for since the last call, their headers left out."""
    gone = [path for method, path in Hub.seen if method == "GET" and WEIGHTS in path and "resolve" not in path]
    Hub.seen.clear()
    return len(gone)


def check(hub, url):
    module, name = {"hf": ("huggingface_hub", f"hf:{ID}"), "ms": ("modelscope", f"ms:{ID}")}[hub]
    code = f"from {module} import snapshot_download; print(snapshot_download({ID!r}%s))"
    expected = {name: sha256(data) for name, data in FILES.items()}

    def content(folder):
        folder = pathlib.Path(folder)
        return {path.name: sha256(path.read_bytes()) for path in folder.iterdir() if not path.name.startswith(".")}

    with tempfile.TemporaryDirectory() as home:
        folder = program(home, url, "pull", name)
        assert weights_fetched() == 1
        found = python(home, url, code % ", local_files_only=True")
        assert os.path.samefile(folder, found), (folder, found)
        assert content(found) == expected
        again = python(home, url, code % "")
        assert os.path.samefile(folder, again), (folder, again)
        assert weights_fetched() == 0, f"{module} downloads again what `pull` wrote"
        print(f"{module} finds what `pull` wrote: {found.replace(home, '~')}")
    with tempfile.TemporaryDirectory() as home:
        folder = python(home, url, code % "")
        assert weights_fetched() >= 1
        report = program(
            home, url, "infer", "--device", "cpu", "--max-new-tokens", "4", "--model", ID, HF_HUB_OFFLINE="1"
        )
        assert report
        pulled = program(home, url, "pull", name)
        assert os.path.samefile(folder, pulled), (folder, pulled)
        assert weights_fetched() == 0, f"`pull` downloads again what {module} wrote"
        print(f"`pull` and `infer` find what {module} wrote: {folder.replace(home, '~')}")


def check_tls():
    if not shutil.which("openssl"):
        return print("TLS is not checked: no openssl")
    with tempfile.TemporaryDirectory() as home:
        certificate, key = f"{home}/cert.pem", f"{home}/key.pem"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
             "-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=critical,CA:FALSE",
             "-keyout", key, "-out", certificate],
            check=True, capture_output=True,
        )
        url = start((certificate, key))
        program(home, url, "pull", ID, "--include", "*.json", SSL_CERT_FILE=certificate)
        refused = subprocess.run(
            [PROGRAM, "pull", ID], env=environment(home, url), cwd=home, capture_output=True, text=True
        )
        assert refused.returncode == 1 and "certificate" in refused.stderr, refused.stderr
        print("TLS: the certificate in SSL_CERT_FILE is trusted, an unknown one is not")


PROGRAM = str(pathlib.Path(sys.argv[1]).resolve())
CDN, URL = start(), start()
check("hf", URL)
check("ms", URL)
check_tls()
