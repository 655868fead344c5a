#!/usr/bin/env python3
"""Training and inference in several processes, on one machine that plays several.

    cargo build --release
    sudo python3 tests/cluster/run.py --netem            # network namespaces, 10 ms delay, 1 % loss
    python3 tests/cluster/run.py equal strangers         # some of it, over the loopback

Each process runs in a network namespace of its own, with delay and loss on the way to the others; without --netem all
share the loopback. What is compared is compared bit by bit: losses and norms of every step, the adapter and
the optimizer's moments, with those of one process whose accumulation is multiplied.
"""

import argparse
import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = [
    "model=model/tiny",
    "train_data=data/sample/train/samples.jsonl",
    "val_data=data/sample/val/samples.jsonl#12",
    'device=["cpu"]',
    "max_steps=6",
    "save_steps=2",
    "eval_steps=3",
    "eval_generate=0",
    "logging_steps=1",
    "dataloader_num_workers=1",
]
MICRO_BATCHES = 2


class Failed(Exception):
    """A check that did not hold."""


def check(holds, text):
    if not holds:
        raise Failed(text)


class Net:
    """Where the processes run: network namespaces with delay and loss between them, or the loopback.

    Packets of a namespace go through a TUN device to this program, which drops some and passes the others on late:
    a kernel without netem does as well.
    """

    DELAY, LOSS = 0.010, 0.01

    def __init__(self, netem, count):
        self.netem, self.count = netem, count
        self.names = [f"xraynet{place}" for place in range(count)]
        self.passed = self.dropped = 0
        if not netem:
            return
        self.close()
        self.files, self.late, self.turn = [], [], threading.Condition()
        for place, name in enumerate(self.names):
            device = f"xraytun{place}"
            file = os.open("/dev/net/tun", os.O_RDWR)
            # TUNSETIFF, with IFF_TUN and IFF_NO_PI.
            fcntl.ioctl(file, 0x400454CA, struct.pack("16sH22x", device.encode(), 0x0001 | 0x1000))
            self.files.append(file)
            self.ip("netns", "add", name)
            self.ip("link", "set", device, "netns", name)
            inside = ["ip", "-n", name]
            self.sh(*inside, "addr", "add", f"{self.address(place)}/24", "dev", device)
            self.sh(*inside, "link", "set", device, "up", "mtu", "1500")
            self.sh(*inside, "link", "set", "lo", "up")
        for file in self.files:
            threading.Thread(target=self.take, args=(file,), daemon=True).start()
        threading.Thread(target=self.deliver, daemon=True).start()

    def take(self, file):
        generator = random.Random(file)
        while True:
            try:
                packet = os.read(file, 2048)
            except OSError:
                return
            # IPv4 to 10.77.0.N; other packets are the system's own.
            if packet[0] >> 4 != 4 or packet[16:19] != bytes([10, 77, 0]) or not 1 <= packet[19] <= self.count:
                continue
            if generator.random() < self.LOSS:
                self.dropped += 1
                continue
            with self.turn:
                self.late.append((time.monotonic() + self.DELAY, self.files[packet[19] - 1], packet))
                self.turn.notify()

    def deliver(self):
        while True:
            with self.turn:
                while not self.late:
                    self.turn.wait()
                # All wait as long: the first to come is the first to go.
                due, file, packet = self.late.pop(0)
            left = due - time.monotonic()
            if left > 0:
                time.sleep(left)
            try:
                os.write(file, packet)
                self.passed += 1
            except OSError:
                pass

    @staticmethod
    def sh(*words):
        subprocess.run(words, check=True)

    def ip(self, *words):
        self.sh("ip", *words)

    def address(self, place):
        return f"10.77.0.{place + 1}" if self.netem else "127.0.0.1"

    def words(self, place):
        return ["ip", "netns", "exec", self.names[place]] if self.netem else []

    def close(self):
        if self.netem:
            if self.passed:
                print(f"{self.passed + self.dropped} packets, {self.dropped} of them dropped, {1e3 * self.DELAY:.0f} ms each way")
            for name in self.names:
                subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)


class Lab:
    def __init__(self, args):
        self.binary = str(Path(args.binary).resolve())
        self.net = Net(args.netem, 4)
        self.work = Path(tempfile.mkdtemp(prefix="xray-cluster-"))
        self.port = 29600 + random.randrange(300)
        self.references = {}

    def environment(self, extra=None):
        known = ("RANK", "WORLD_SIZE", "LOCAL_", "SLURM_", "PET_", "OMPI_", "PMI_", "NNODES", "NODE_RANK", "MASTER_",
                 "TORCHELASTIC", "GROUP_", "NPROC_")
        clean = {key: value for key, value in os.environ.items() if not key.startswith(known)}
        return {**clean, "XRAY_CLUSTER_KEY": "a secret", "RAYON_NUM_THREADS": "1", **(extra or {})}

    def train(self, out, accumulation, *words, timeout=30, sets=()):
        command = [self.binary, "train", "--config", "configs/tiny.toml", "--no-tui", "--show", "0",
                   "--output-dir", str(out)]
        # The last of a key counts.
        keys = {}
        for pair in [*SETTINGS, f"gradient_accumulation_steps={accumulation}", f"ddp_timeout={timeout}", *sets]:
            key, _, value = pair.partition("=")
            keys[key] = value
        for key, value in keys.items():
            command += ["--set", f"{key}={value}"]
        return command + list(words)

    def start(self, place, command, env=None, log=None):
        log = log or self.work / f"node-{place}.log"
        out = open(log, "w")
        return subprocess.Popen(self.net.words(place) + command, cwd=ROOT, stdout=out, stderr=out,
                                env=self.environment(env))

    def next_port(self):
        self.port += 1
        return self.port

    def nodes(self, count, out, accumulation=MICRO_BATCHES, words=(), timeout=30, sets=(), env=None, per_node=None):
        """Starts `count` nodes of a run."""
        port = self.next_port()
        started = []
        for place in range(count):
            own = (per_node or {}).get(place, {})
            command = self.train(own.get("out", out), accumulation, "--nnodes", str(count), "--node-rank", str(place),
                                 "--master", f"{self.net.address(0)}:{port}", *words, timeout=timeout,
                                 sets=[*sets, *own.get("sets", ())])
            started.append(self.start(place, command, {**(env or {}), **own.get("env", {})}))
        return started

    def log(self, place):
        return (self.work / f"node-{place}.log").read_text(errors="replace")

    def wait(self, processes, seconds=300):
        end = time.time() + seconds
        for process in processes:
            try:
                process.wait(max(0.1, end - time.time()))
            except subprocess.TimeoutExpired:
                for other in processes:
                    other.kill()
                raise Failed(f"a process did not end within {seconds} s\n" + self.logs(len(processes)))
        return [process.returncode for process in processes]

    def logs(self, count):
        return "\n".join(f"--- node {place}\n{self.log(place)[-1500:]}" for place in range(count))

    def reference(self, micro_batches, sets=()):
        """One process with all micro-batches."""
        key = (micro_batches, tuple(sets))
        if key not in self.references:
            out = self.work / f"reference-{len(self.references)}"
            process = self.start(0, self.train(out, micro_batches, sets=sets))
            check(self.wait([process]) == [0], self.logs(1))
            self.references[key] = result(out)
        return self.references[key]


def result(run):
    """Losses and hashes of a run's last checkpoint."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "loss", "token_acc", "grad_norm", "learning_rate", "eval_loss", "eval_token_acc")
    measured = [{key: row[key] for key in keys if key in row} for row in rows]
    last = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    hashes = {name: hashlib.sha256((last / name).read_bytes()).hexdigest()
              for name in ("adapter_model.safetensors", "optimizer.safetensors")}
    return {"last": last.name, "measured": measured, **hashes}


def same(found, wanted, what):
    for key in wanted:
        if found[key] != wanted[key]:
            if key == "measured":
                pairs = zip(found[key], wanted[key])
                differing = next((pair for pair in pairs if pair[0] != pair[1]), (len(found[key]), len(wanted[key])))
                raise Failed(f"{what}: measured values differ, first {differing}")
            raise Failed(f"{what}: {key} differs: {found[key]} and {wanted[key]}")


def equal(lab, args):
    """Two, three and four processes are one process with the accumulation multiplied, bit by bit."""
    for count in (2, 3, 4):
        out = lab.work / f"equal-{count}"
        started = time.time()
        processes = lab.nodes(count, out)
        check(lab.wait(processes) == [0] * count, lab.logs(count))
        same(result(out), lab.reference(count * MICRO_BATCHES), f"{count} processes")
        others = [path for path in lab.work.glob("*rank-*")]
        check(not others, f"left behind: {others}")
        print(f"  {count} processes: the bits of one, {time.time() - started:.1f} s", flush=True)
    for name, sets in (("packed", ["packing=true", "packing_tokens=512"]), ("skipped", ['overlong="skip"', "max_length=330"])):
        out = lab.work / f"equal-{name}"
        processes = lab.nodes(2, out, sets=sets)
        check(lab.wait(processes) == [0, 0], lab.logs(2))
        same(result(out), lab.reference(2 * MICRO_BATCHES, sets), name)
        print(f"  2 processes, {name}: the bits of one")


def devices(lab, args):
    """One process with two devices and one with one; the sums are in the same order."""
    out = lab.work / "devices"
    processes = lab.nodes(2, out, per_node={0: {"sets": ['device=["cpu","cpu"]']}})
    check(lab.wait(processes) == [0, 0], lab.logs(2))
    same(result(out), lab.reference(3 * MICRO_BATCHES), "two devices and one")
    print("  two devices in one process and one in another: the bits of one")


def generate(lab, args):
    """Validation with generated reports is dealt out too."""
    sets = ["eval_generate=5", "eval_max_new_tokens=24", "per_device_eval_batch_size=2", "max_steps=2"]
    out = lab.work / "generate"
    processes = lab.nodes(3, out, sets=sets)
    check(lab.wait(processes) == [0] * 3, lab.logs(3))
    reference = lab.reference(3 * MICRO_BATCHES, sets)
    same(result(out), reference, "with generated reports")
    print("  generated reports of 3 processes: the validation of one")


def kill(lab, args):
    """kill -9 of any process at any moment: all end with its name; resumed, the bits are those of an unbroken run."""
    count = 3
    sets = ["max_steps=5", "save_steps=1", "eval_steps=0", "val_data=data/sample/val/samples.jsonl#4"]
    wanted = lab.reference(count, sets)
    out = lab.work / "timing"
    started = time.time()
    check(lab.wait(lab.nodes(count, out, 1, sets=sets)) == [0] * count, lab.logs(count))
    whole = time.time() - started
    generator = random.Random(args.seed)
    ended, slowest = 0, 0.0
    for attempt in range(args.kills):
        out = lab.work / f"kill-{attempt}"
        victim, moment = generator.randrange(count), generator.uniform(0.05, whole)
        processes = lab.nodes(count, out, 1, words=("--resume", "auto"), timeout=30, sets=sets)
        time.sleep(moment)
        was_running = processes[victim].poll() is None
        processes[victim].send_signal(signal.SIGKILL)
        killed = time.time()
        codes = lab.wait(processes, 90)
        slowest = max(slowest, time.time() - killed)
        survivors = [place for place in range(count) if place != victim]
        all_done = all(codes[place] == 0 for place in survivors)
        if was_running and not all_done:
            ended += 1
            for place in survivors:
                text = lab.log(place)
                named = f"node {victim} (" in text or f"node {victim} of" in text or f"node {victim}, " in text
                # One that had not met the others yet, or had left them already.
                before = "does not answer" in text or codes[place] == 0
                check(named or before, f"attempt {attempt}: node {place} does not name node {victim}:\n{text}")
        processes = lab.nodes(count, out, 1, words=("--resume", "auto"), sets=sets)
        check(lab.wait(processes) == [0] * count, f"attempt {attempt}, resumed:\n" + lab.logs(count))
        found = result(out)
        same(found, wanted, f"attempt {attempt} (node {victim} at {moment:.2f} s)")
        print(f"    {attempt + 1}: node {victim} at {moment:.2f} s of {whole:.1f}: exit codes {codes}; resumed, the same bits",
              flush=True)
        shutil.rmtree(out)
    print(f"  {args.kills} kills of random processes in {whole:.1f} s of a run: {ended} ended it, all with the name, "
          f"at most {slowest:.1f} s later; all resumed to the same bits")


def stall(lab, args):
    """A process that is stopped ends the run within ddp_timeout, with its name."""
    for victim in (1, 0):
        out = lab.work / f"stall-{victim}"
        processes = lab.nodes(3, out, timeout=args.stall, sets=["max_steps=200", "eval_steps=0"])
        wait_for_step(lab, 3)
        processes[victim].send_signal(signal.SIGSTOP)
        # `ip netns exec` replaces itself: the process is the program.
        stopped = time.time()
        others = [process for place, process in enumerate(processes) if place != victim]
        codes = lab.wait(others, 4 * args.stall + 40)
        took = time.time() - stopped
        processes[victim].send_signal(signal.SIGCONT)
        lab.wait(processes, 60)
        check(all(codes), f"stall of {victim}: {codes}")
        for place in range(3):
            if place != victim:
                text = lab.log(place)
                check(f"node {victim} (" in text.split("error:")[-1], f"node {place} does not name node {victim}:\n{text}")
                check("the last checkpoint is" in text, text)
        check(processes[victim].returncode != 0, "the stalled one ends as well")
        print(f"  node {victim} stopped: the others ended after {took:.1f} s with its name and the last checkpoint")


def wait_for_step(lab, step, place=0, seconds=120):
    end = time.time() + seconds
    while f"step {step}/" not in lab.log(place):
        check(time.time() < end, f"no step {step}\n" + lab.logs(2))
        time.sleep(0.05)


def differ(lab, args):
    """Another data file, setting, weights or key is named before the first step."""
    lines = (ROOT / "data/sample/train/samples.jsonl").read_text().splitlines(True)
    folder = lab.work / "data"
    folder.mkdir(exist_ok=True)
    other = folder / "train.jsonl"
    # The images' names are relative to the file.
    base = str(ROOT / "data/sample/train")
    (folder / "images").exists() or os.symlink(f"{base}/images", folder / "images")
    other.write_text("".join(lines[:-1]))
    model = lab.work / "model"
    if not model.exists():
        shutil.copytree(ROOT / "model/tiny", model)
        weights = next(model.glob("*.safetensors"))
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(bytes(data))
    cases = {
        "another data file": ({"sets": [f"train_data={other}"]}, "another `data/sample/train/samples.jsonl`"),
        "another setting": ({"sets": ["learning_rate=0.5"]}, "learning_rate"),
        "other weights": ({"sets": [f"model={model}"]}, "another base model"),
        "another key": ({"env": {"XRAY_CLUSTER_KEY": "wrong"}}, "another key"),
    }
    for name, (own, says) in cases.items():
        processes = lab.nodes(2, lab.work / "differ", timeout=6, per_node={1: own})
        codes = lab.wait(processes, 60)
        check(all(codes), f"{name}: {codes}\n" + lab.logs(2))
        texts = [lab.log(place) for place in range(2)]
        check(any(says in text for text in texts), f"{name}: nobody says `{says}`:\n" + lab.logs(2))
        if name != "another key":
            check(all("node 1 (" in text for text in texts), f"{name}: not named everywhere\n" + lab.logs(2))
        print(f"  {name}: {next(text for text in texts if says in text).split('error: ')[-1].strip()[:150]}")


def strangers(lab, args):
    """What connects and does not belong changes nothing: garbage, a half greeting, many silent ones."""
    out = lab.work / "strangers"
    port = lab.port + 1
    target = (lab.net.address(0), port)
    stop = threading.Event()
    tried = [0]

    def talk():
        held = []
        while not stop.is_set():
            try:
                stream = socket.create_connection(target, 1)
            except OSError:
                time.sleep(0.05)
                continue
            tried[0] += 1
            kind = tried[0] % 4
            try:
                if kind == 0:
                    stream.sendall(os.urandom(4096))
                    stream.close()
                elif kind == 1:
                    stream.sendall(b"GET / HTTP/1.1\r\n\r\n")
                    stream.close()
                elif kind == 2:
                    stream.sendall(b"xrayteam")
                    held.append(stream)
                else:
                    held.append(stream)
            except OSError:
                pass
            time.sleep(0.01)
        for stream in held:
            stream.close()

    # From a namespace of its own where there are namespaces.
    processes = lab.nodes(2, out)
    if lab.net.netem:
        source = Path(__file__).resolve()
        stranger = subprocess.Popen(lab.net.words(3) + [sys.executable, str(source), "--strange", f"{target[0]}:{port}"])
    else:
        stranger = None
        threading.Thread(target=talk, daemon=True).start()
    codes = lab.wait(processes)
    stop.set()
    if stranger:
        stranger.kill()
    check(codes == [0, 0], lab.logs(2))
    said = lab.log(0)
    same(result(out), lab.reference(2 * MICRO_BATCHES), "with strangers")
    check("was turned away" in said, said)
    print(f"  garbage, half greetings and silence at the port ({said.count('was turned away')} told of): the same bits")


def strange(target):
    """Connects for ever and says nothing useful."""
    host, port = target.split(":")
    held, tried = [], 0
    while True:
        try:
            stream = socket.create_connection((host, int(port)), 1)
        except OSError:
            time.sleep(0.05)
            continue
        tried += 1
        try:
            if tried % 3 == 0:
                stream.sendall(os.urandom(4096))
            elif tried % 3 == 1:
                stream.sendall(b"xrayteam")
            held.append(stream)
        except OSError:
            pass
        time.sleep(0.01)


def restart(lab, args):
    """The first process is killed, all end, all are started again at once: the bits of an unbroken run."""
    out = lab.work / "restart"
    processes = lab.nodes(3, out, timeout=20)
    wait_for_step(lab, 3)
    processes[0].send_signal(signal.SIGKILL)
    codes = lab.wait(processes, 40)
    check(all(codes), f"{codes}")
    for place in (1, 2):
        check("node 0 (" in lab.log(place) and "left" in lab.log(place), lab.log(place))
    # The port of the first start, which another one is to take at once.
    lab.port -= 1
    processes = lab.nodes(3, out, words=("--resume", "auto"))
    check(lab.wait(processes) == [0] * 3, lab.logs(3))
    same(result(out), lab.reference(3 * MICRO_BATCHES), "restarted")
    print("  the first process killed and all started again at the same port: the same bits")


def handout(lab, args):
    """Nodes without the run's folder get the checkpoint from the first one."""
    out = lab.work / "handout"
    elsewhere = {1: {"out": lab.work / "elsewhere-1"}, 2: {"out": lab.work / "elsewhere-2"}}
    # As an interruption would leave it: whole checkpoints up to a step.
    processes = lab.nodes(3, out, per_node=elsewhere, timeout=20)
    wait_for_step(lab, 5)
    processes[1].send_signal(signal.SIGKILL)
    lab.wait(processes, 40)
    hidden = lab.work / "hidden"
    out.rename(hidden)
    # The same folder under another name for the first alone: the others cannot see it.
    seen = {0: {"out": hidden}, **elsewhere}
    processes = lab.nodes(3, out, per_node=seen, words=("--resume", "auto"))
    check(lab.wait(processes) == [0] * 3, lab.logs(3))
    same(result(hidden), lab.reference(3 * MICRO_BATCHES), "handed out")
    check(not (lab.work / "elsewhere-1").exists(), "a node that does not write made a folder")
    print("  checkpoint handed out to nodes without it: the same bits")


def launchers(lab, args):
    """SLURM, Kubeflow, PAI-DLC and MPI by their variables."""
    def run(name, of, per_place):
        out = lab.work / f"launch-{name}"
        port = lab.next_port()
        processes = []
        for place in range(2):
            env = {**of(port), **per_place(place)}
            processes.append(lab.start(place, lab.train(out, MICRO_BATCHES), env))
        check(lab.wait(processes) == [0, 0], f"{name}:\n" + lab.logs(2))
        said = lab.log(1).splitlines()[0][:140]
        same(result(out), lab.reference(2 * MICRO_BATCHES), name)
        print(f"  {name}: {said}")

    host = lab.net.address(0)
    run("kubeflow", lambda port: {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "auto", "PET_MASTER_ADDR": host,
                                  "PET_MASTER_PORT": str(port)}, lambda place: {"PET_NODE_RANK": str(place)})
    run("pai-dlc", lambda port: {"WORLD_SIZE": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": host,
                                 "MASTER_PORT": str(port)}, lambda place: {"RANK": str(place)})
    run("swift", lambda port: {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": host,
                               "MASTER_PORT": str(port)}, lambda place: {"NODE_RANK": str(place)})
    run("slurm", lambda port: {"SLURM_JOB_ID": str(4000 + port % 1000), "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2",
                               "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": host, "SLURM_TASKS_PER_NODE": "1(x2)"},
        lambda place: {"SLURM_PROCID": str(place), "SLURM_LOCALID": "0", "SLURM_NODEID": str(place)})
    run("open-mpi", lambda port: {"OMPI_COMM_WORLD_SIZE": "2", "MASTER_ADDR": host, "MASTER_PORT": str(port)},
        lambda place: {"OMPI_COMM_WORLD_RANK": str(place), "OMPI_COMM_WORLD_LOCAL_RANK": "0",
                       "OMPI_COMM_WORLD_LOCAL_SIZE": "1"})


def torchrun(lab, args):
    """A real torchrun starts two processes, is restarted by it after a kill, and ends with the same bits."""
    if not args.torchrun:
        print("  left out: name a torchrun with --torchrun (pip install torch)")
        return
    out = lab.work / "torchrun"
    port = lab.next_port()
    lab.port += 1
    command = [args.torchrun, "--nnodes=1", "--nproc-per-node=2", "--max-restarts=2", f"--master-port={port}",
               "--no-python", *lab.train(out, MICRO_BATCHES, "--resume", "auto", timeout=20)]
    process = lab.start(0, command)
    wait_for_step(lab, 3)
    # Any of the two.
    children = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "train"], capture_output=True, text=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    check(lab.wait([process]) == [0], lab.logs(1))
    text = lab.log(0)
    same(result(out), lab.reference(2 * MICRO_BATCHES), "torchrun")
    check(text.count("process 1 of 2") >= 2, text)
    print("  torchrun with 2 processes, one killed, restarted by it: the same bits")
    out = lab.work / "torchrun-nodes"
    processes = []
    for place in range(2):
        command = [args.torchrun, "--nnodes=2", f"--node-rank={place}", "--nproc-per-node=1",
                   f"--master-addr={lab.net.address(0)}", f"--master-port={lab.port + 5}", "--no-python",
                   *lab.train(out, MICRO_BATCHES)]
        processes.append(lab.start(place, command))
    lab.port += 8
    check(lab.wait(processes) == [0, 0], lab.logs(2))
    same(result(out), lab.reference(2 * MICRO_BATCHES), "torchrun on two nodes")
    print("  torchrun on 2 nodes: the same bits")


def infer(lab, args):
    """Reports of three processes are those of one, in order; a killed run goes on."""
    images = sorted((ROOT / "data/sample/val/images").iterdir())[:24]
    def command(out, *words):
        return [lab.binary, "infer", *map(str, images), "--model", "model/tiny", "--device", "cpu", "--max-new-tokens",
                "48", "--batch-size", "2", "--output", str(out), *words]
    alone = lab.work / "alone.jsonl"
    check(lab.wait([lab.start(0, command(alone))]) == [0], lab.logs(1))

    def reports(path):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [(row["image"], row["report"], row["completion_tokens"]) for row in rows]

    def nodes(out):
        port = lab.next_port()
        return [lab.start(place, command(out, "--nnodes", "3", "--node-rank", str(place), "--master",
                                         f"{lab.net.address(0)}:{port}", "--cluster-timeout", "20"))
                for place in range(3)]
    together = lab.work / "together.jsonl"
    check(lab.wait(nodes(together)) == [0] * 3, lab.logs(3))
    check(reports(together) == reports(alone), "reports of three processes")
    broken = lab.work / "broken.jsonl"
    processes = nodes(broken)
    end = time.time() + 60
    while not broken.exists() or broken.read_text().count("\n") < 4:
        check(time.time() < end, lab.logs(3))
        time.sleep(0.02)
    processes[2].send_signal(signal.SIGKILL)
    lab.wait(processes, 40)
    held = broken.read_text().count("\n")
    check(reports(broken) == reports(alone)[: len(reports(broken))], "a beginning of the whole")
    check(lab.wait(nodes(broken)) == [0] * 3, lab.logs(3))
    check(reports(broken) == reports(alone), "resumed")
    print(f"  infer on 3 nodes: the file of one; killed with {held} of {len(images)} reports and resumed: the same")


ALL = [equal, devices, generate, infer, differ, strangers, stall, restart, handout, launchers, torchrun, kill]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=", ".join(one.__name__ for one in ALL))
    parser.add_argument("--binary", default=str(ROOT / "target/release/xray-qwen3vl"))
    parser.add_argument("--netem", action="store_true", help="network namespaces with delay and loss; wants root")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stall", type=float, default=10, help="ddp_timeout of the runs in which a process is stopped")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--torchrun", help="path of a torchrun")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--strange", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.strange:
        strange(args.strange)
    chosen = [one for one in ALL if not args.names or one.__name__ in args.names]
    lab = Lab(args)
    failed = []
    try:
        for one in chosen:
            started = time.time()
            print(f"{one.__name__}: {one.__doc__}", flush=True)
            try:
                one(lab, args)
                print(f"  ok, {time.time() - started:.0f} s", flush=True)
            except Failed as error:
                failed.append(one.__name__)
                print(f"  FAILED: {error}", flush=True)
    finally:
        lab.net.close()
        if not args.keep and not failed:
            shutil.rmtree(lab.work, ignore_errors=True)
        else:
            print(f"logs and runs in {lab.work}")
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
