#!/usr/bin/env python3
"""Five ways to take a server from everybody, and how long another user's film waits meanwhile.

Usage: takedown.py [SERVER]. Starts a server of its own for each way, on loopback alone; SERVER, or
$XRAY_SERVER, is the program. Every way ends by itself. Prints a table; exit code 1 if the film waited for
more than two seconds, or if the server held more than its memory budget.

The two seconds are those of a machine that does nothing else: where its processors are full, and other programs
have a part of them, the film may wait for as much longer. The table has the share that the test had.

The crowd asks from 127.0.0.1, the other user from 127.0.0.2. Only Python's own modules are used.
"""

import base64
import http.client
import json
import os
import re
import resource
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("XRAY_SERVER", "target/release/xray-qwen3vl")
BUDGET_MIB = 1024
MOST_SECONDS = 2.0
# A film that has not come by then is not waited for.
PATIENCE = 30.0
# What a way may go on for.
WINDOW = 8.0
# Beyond the budget: the allocator keeps some of what was freed.
SLACK_MIB = 256
ADDRESS_SPACE = 8 << 30


class Server:
    def __init__(self, *options):
        self.log = tempfile.NamedTemporaryFile(mode="r", suffix=".log")
        known = subprocess.run([PROGRAM, "serve", "--help"], capture_output=True, text=True, check=True).stdout
        budget = ["--max-waiting-memory-mib", str(BUDGET_MIB)] if "--max-waiting-memory-mib" in known else []
        limits = ["--max-body-mib", "24", "--max-image-megapixels", "48"]

        def bound():
            # A server without a budget must not take the machine.
            resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))

        self.process = subprocess.Popen(
            [PROGRAM, "serve", "--device", "cpu", "--port", "0", *limits, *budget, *options],
            cwd=REPOSITORY, stderr=open(self.log.name, "w"), preexec_fn=bound,
        )
        found = None
        for _ in range(1200):
            found = re.search(r"http://127\.0\.0\.1:(\d+)", Path(self.log.name).read_text())
            if found or self.process.poll() is not None:
                break
            time.sleep(0.1)
        if not found:
            sys.exit(f"the server did not start: {Path(self.log.name).read_text()}")
        self.port = int(found.group(1))

    def memory_mib(self, key):
        try:
            text = Path(f"/proc/{self.process.pid}/status").read_text()
            return int(re.search(rf"{key}:\s*(\d+)", text).group(1)) // 1024
        except (OSError, AttributeError):
            return None

    def ask(self, method, path, body=None, source="127.0.0.1", timeout=PATIENCE, headers=None):
        """Status and seconds; the status is 0 where no answer came."""
        started = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout, source_address=(source, 0))
        try:
            connection.request(method, path, body, headers or {"content-type": "application/json"})
            response = connection.getresponse()
            response.read()
            return response.status, time.monotonic() - started
        except (OSError, http.client.HTTPException):
            return 0, time.monotonic() - started
        finally:
            connection.close()

    def ticks(self):
        """Processor time of the server, in ticks of the clock."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
            return int(fields[11]) + int(fields[12])
        except OSError:
            return 0

    def stop(self):
        self.process.kill()
        self.process.wait()


class Clock:
    """The share of the processors that a server and this test have, from now on."""

    def __init__(self, server):
        self.server, self.before = server, self.now(server)

    @staticmethod
    def now(server):
        fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        idle = fields[3] + fields[4]
        own = os.times()
        own = (own.user + own.system) * os.sysconf("SC_CLK_TCK") + server.ticks()
        return sum(fields) - idle, idle, own

    def share(self):
        busy, idle, own = (after - before for after, before in zip(self.now(self.server), self.before))
        # Who waits beside an idle processor does not wait for other programs.
        if busy == 0 or idle > (busy + idle) / 10:
            return 1.0
        return min(1.0, max(own / busy, 0.05))


def png(width, height, bits=8, colour=0):
    """A picture of one colour: black."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    row = bytes(1 + width * (3 if colour == 2 else 1) * bits // 8)
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def question(pictures, **more):
    parts = [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(one).decode()}}
             for one in pictures]
    parts.append({"type": "text", "text": "请写一份报告。"})
    return json.dumps({"messages": [{"role": "user", "content": parts}], **more}).encode()


FILM = question([(REPOSITORY / "data/sample/demo.png").read_bytes()], max_tokens=16)


def together(count, work):
    """Starts `count` threads; they end by themselves."""
    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


def long_text(server):
    body = json.dumps({"messages": [{"role": "user", "content": "a b " * (4 << 20)}]}).encode()
    together(2, lambda: server.ask("POST", "/v1/chat/completions", body, timeout=5))


def full_queue(server):
    small = png(1000, 1000)
    body = question([small] * 4, max_tokens=400, ignore_eos=True)
    together(60, lambda: server.ask("POST", "/v1/chat/completions", body, timeout=WINDOW + 4))


def previews(server):
    large = png(6000, 6000, bits=16, colour=2)
    head = {"content-type": "image/png"}
    together(24, lambda: server.ask("POST", "/v1/images/preview", large, timeout=WINDOW + 4, headers=head))


def silent_readers(server):
    request = b"GET /strings.js HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n" * 200
    held = []
    for _ in range(1030):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.settimeout(0.2)
        try:
            client.connect(("127.0.0.1", server.port))
            client.sendall(request)
        except OSError:
            pass
        held.append(client)
    # They are closed when the server is.
    server.held = held


def many_answers(server):
    body = question([], max_tokens=200, ignore_eos=True)

    def user():
        until = time.monotonic() + WINDOW
        while time.monotonic() < until:
            server.ask("POST", "/v1/chat/completions", body, timeout=WINDOW)

    together(100, user)


WAYS = [
    ("two texts of 16 MiB", long_text, []),
    ("60 requests of 4 images", full_queue, ["--max-running", "4"]),
    ("24 large previews", previews, []),
    ("100 who ask on and on", many_answers, []),
    ("1,030 silent readers", silent_readers, []),
]


def main():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    failed = False
    print(f"| {'way':<24} | film alone, s | film meanwhile, s | /healthz, s | share, % | memory before, MiB | at most, MiB |")
    print(f"|{'-' * 26}|{'-' * 15}|{'-' * 19}|{'-' * 13}|{'-' * 10}|{'-' * 20}|{'-' * 14}|")
    for name, way, options in WAYS:
        server = Server(*options)
        server.ask("POST", "/v1/chat/completions", FILM, "127.0.0.2")
        _, alone = server.ask("POST", "/v1/chat/completions", FILM, "127.0.0.2")
        before = server.memory_mib("VmRSS")
        clock = Clock(server)
        way(server)
        time.sleep(1)
        started, longest, probe, lost = time.monotonic(), 0.0, 0.0, False
        while time.monotonic() - started < WINDOW:
            status, seconds = server.ask("GET", "/healthz")
            probe = max(probe, seconds if status == 200 else PATIENCE)
            status, seconds = server.ask("POST", "/v1/chat/completions", FILM, "127.0.0.2")
            longest = max(longest, seconds)
            lost |= status != 200
            time.sleep(0.2)
        share = clock.share()
        peak = server.memory_mib("VmHWM")
        ended = server.process.poll() is not None
        server.stop()
        most = MOST_SECONDS / share
        bad = lost or ended or longest > most or probe > most
        bad |= peak is None or peak > before + BUDGET_MIB + SLACK_MIB
        failed |= bad
        note = " the server ended" if ended else " no answer" if lost else ""
        held = "–" if peak is None else str(peak)
        print(f"| {name:<24} | {alone:13.2f} | {longest:17.2f} | {probe:11.2f} | {100 * share:8.0f} | {before:18} | {held:>12} |"
              f"{' FAILED' if bad else ''}{note}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
