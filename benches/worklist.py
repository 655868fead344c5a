#!/usr/bin/env python3
"""Fills a store with studies through the API and times the worklist: medians and 99th percentiles in milliseconds.

usage: benches/worklist.py PROGRAM [STUDIES]      (10,000 studies unless said otherwise; Python's own library alone)
"""
import base64, http.client, json, statistics, struct, subprocess, sys, tempfile, threading, time, zlib


def png(number):
    """A grey picture of 32 by 32 pixels, another for each number."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes((number * 7 + x * y) % 256 for x in range(32)) for y in range(32))
    text = chunk(b"tEXt", b"n\0" + str(number).encode())
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 32, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + text + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


class Client:
    def __init__(self, address, key):
        self.connection = http.client.HTTPConnection(address)
        self.head = {"authorization": f"Bearer {key}", "content-type": "application/json"}

    def ask(self, method, path, body=None):
        body = None if body is None else json.dumps(body)
        began = time.perf_counter()
        self.connection.request(method, path, body, self.head)
        response = self.connection.getresponse()
        data = response.read()
        assert response.status < 300, (path, response.status, data[:300])
        return (time.perf_counter() - began) * 1000, data


def main():
    program, count = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 10_000
    with tempfile.TemporaryDirectory() as folder:
        add = [program, "store", "key", "add", "--store", folder, "--name", "bench", "--role", "administrator"]
        key = subprocess.run(add, check=True, capture_output=True, text=True).stdout.strip()
        serve = [program, "serve", "--device", "cpu", "--port", "0", "--store", folder]
        server = subprocess.Popen(serve, stderr=subprocess.PIPE, text=True)
        address = next(line for line in server.stderr if "://" in line).split("://")[1].split(",")[0].strip()
        threading.Thread(target=lambda: [None for _ in server.stderr], daemon=True).start()
        fill(address, key, count)
        measure(address, key, count)
        server.terminate()
        server.wait()
        began = time.perf_counter()
        server = subprocess.Popen(serve, stderr=subprocess.PIPE, text=True)
        next(line for line in server.stderr if "://" in line)
        print(f"start with {count} studies: {time.perf_counter() - began:.2f} s")
        server.kill()


def fill(address, key, count):
    began = time.perf_counter()

    def work(first):
        client = Client(address, key)
        for number in range(first, count, 8):
            client.ask("POST", "/v1/studies", {
                "patient": {"id": f"P-{number // 2}", "name": f"Patient {number // 2}", "sex": "FM"[number % 2]},
                "accession": f"A-{number}", "date": f"2026{1 + number % 12:02}{1 + number % 28:02}", "description": "chest PA",
                "complete": False, "films": [{"file": base64.b64encode(png(number)).decode(), "view": "PA"}]})

    threads = [threading.Thread(target=work, args=(first,)) for first in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    seconds = time.perf_counter() - began
    print(f"{count} studies received in {seconds:.0f} s, {count / seconds:.0f} a second")


def measure(address, key, count):
    client = Client(address, key)
    study = json.loads(client.ask("POST", "/v1/worklist", {"search": f"A-{count - 1}"})[1])["studies"][0]["id"]
    film = json.loads(client.ask("GET", f"/v1/studies/{study}")[1])["films"][0]["id"]
    cases = {
        "first page, urgent first": ("POST", "/v1/worklist", {}),
        "last page": ("POST", "/v1/worklist", {"offset": count - 50}),
        "page of 200, newest first": ("POST", "/v1/worklist", {"order": "newest", "limit": 200}),
        "search, one found": ("POST", "/v1/worklist", {"search": f"a-{count - 7}"}),
        "search, two words": ("POST", "/v1/worklist", {"search": "patient chest"}),
        "one state": ("POST", "/v1/worklist", {"state": ["signed"]}),
        "one study, its prior": ("GET", f"/v1/studies/{study}", None),
        "its film": ("GET", f"/v1/studies/{study}/films/{film}", None),
    }
    for name, case in cases.items():
        times = sorted(client.ask(*case)[0] for _ in range(100))
        print(f"{name}: p50 {statistics.median(times):.1f} ms, p99 {times[98]:.1f} ms")


main()
