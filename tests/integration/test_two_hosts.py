"""Two hosts for real: namespaces of the network and of mounts on one machine, joined by a virtual ethernet pair.

They run what torchrun starts on two machines; each may see a folder of its own under the path that both name.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest
import torch
from distributed_scenarios import without_times
from safetensors.torch import load_file

T = TypeVar("T")
ROOT = Path(__file__).parent.parent.parent
CLOCK = """#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *t) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(id, t);
    if (id == CLOCK_REALTIME) t->tv_sec += 3600;
    return result;
}
"""
OTHER_VERSION = """import importlib.metadata
own = importlib.metadata.version
importlib.metadata.version = lambda name: "0.0.1" if name == "bae-lens" else own(name)
"""
STATIC = ("--master-addr", "10.77.0.1", "--master-port", "29400")
C10D = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29400", "--rdzv-id", "run", "--rdzv-conf", "is_host={}")

pytestmark = pytest.mark.slow


class Hosts:
    """The namespaces, and the folder that both call `at`."""

    def __init__(self, folder: Path) -> None:
        self.names = [f"bae{os.getpid()}{letter}" for letter in "ab"]
        self.folder, self.at = folder, folder / "at"
        self.at.mkdir()
        self.running: list[subprocess.Popen[str]] = []

    def connect(self) -> None:
        first, second = self.names
        for name in self.names:
            _ip("netns", "add", name)
        _ip("link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
        for number, name in enumerate(self.names, 1):
            _ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "eth0", "up")

    def unplug(self) -> None:
        _ip("-n", self.names[1], "link", "set", "eth0", "down")

    def start(
        self, own: tuple[Path, Path], launcher: tuple[str, ...], *command: str, on_second: dict[str, str] | None = None
    ) -> None:
        """Runs a command of bae-lens on both, with these folders of theirs under the path `at`."""
        for number, (name, folder) in enumerate(zip(self.names, own, strict=True)):
            folder.mkdir(exist_ok=True)
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
            torchrun += [
                "--local-addr",
                f"10.77.0.{number + 1}",
                "--node-rank",
                str(number),
                *STATIC,
                *(word.format(number == 0) for word in launcher),
            ]
            mounting = ["sh", "-c", 'mount --bind "$1" "$2" && shift 2 && exec "$@"', "sh", str(folder), str(self.at)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
            environment |= {"PYTHONPATH": str(ROOT), **((on_second or {}) if number else {})}
            inside = ["ip", "netns", "exec", name, *mounting, *torchrun, "-m", "bae_lens", *command]
            with (self.folder / f"{name}.log").open("w") as log:
                self.running.append(subprocess.Popen(inside, env=environment, stdout=log, stderr=log, text=True))

    def wait(self) -> tuple[list[int], list[str]]:
        """Exit statuses and what was written, of both."""
        codes = [process.wait(timeout=240) for process in self.running]
        return codes, self.logs()

    def logs(self) -> list[str]:
        return [(self.folder / f"{name}.log").read_text() for name in self.names]

    def wait_for(self, text: str) -> None:
        end = time.monotonic() + 120
        while not all(text in log for log in self.logs()[:1]):
            assert time.monotonic() < end, self.logs()
            time.sleep(0.2)

    def close(self) -> None:
        for started in self.running:
            if started.poll() is None:
                started.kill()
        for name in self.names:
            for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split():
                os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    if shutil.which("ip") is None:
        pytest.skip("network namespaces are made with ip, of iproute2, which is not there")
    made = Hosts(tmp_path)
    try:
        made.connect()
    except subprocess.CalledProcessError as error:
        made.close()
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
    yield made
    made.close()


@pytest.fixture
def settings(tiny_model_folder: Path, tmp_path: Path, tiny_dataset: Any) -> list[str]:
    text = tmp_path / "words.jsonl"
    text.write_text("\n".join(json.dumps({"text": line}) for line in tiny_dataset["text"][:400]))
    small = "--cached-tokens 600 --held-out-tokens 120 --context-size 16 --batch-size 33 --l0 4"
    place = ["--hook-name", "blocks.0.hook_resid_post", "--architectures", "bae", "topk"]
    return ["--model", str(tiny_model_folder), "--dataset", str(text), *small.split(), *place]


def _clock_ahead(folder: Path) -> dict[str, str]:
    """An environment whose clock is an hour ahead; of none where there is no compiler."""
    if shutil.which("cc") is None:
        return {}
    source, library = folder / "clock.c", folder / "clock.so"
    source.write_text(CLOCK)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library)}


def _result(run: Path) -> Any:
    return without_times(json.loads((run / "result.json").read_text()))


def test_hosts_that_share_no_folder_and_no_clock_find_what_one_process_does(hosts, settings, tmp_path):
    command = ["compare", *settings, "--training-tokens", "660", "--seeds", "0", "1"]
    alone = [sys.executable, "-m", "bae_lens", *command, "--output", str(tmp_path / "alone")]
    subprocess.run(alone, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    first, second = tmp_path / "first", tmp_path / "second"
    for kept in ("contexts", "activations"):  # on the first only, of whose cache nothing is computed again
        shutil.copytree(tmp_path / "alone" / kept, first / "run" / kept)
    shutil.copy(tmp_path / "alone" / "run.json", first / "run")
    output = ["--output", str(hosts.at / "run")]
    hosts.start((first, second), (), *command, *output, on_second=_clock_ahead(tmp_path))
    codes, logs = hosts.wait()
    assert codes == [0, 0], logs
    assert _result(first / "run") == _result(tmp_path / "alone")
    assert [("report to open" in log) for log in logs] == [True, False]
    for part in ("activations/train/blocks.0.hook_resid_post/activations.npy", "dictionaries/Top-k/metrics.json"):
        assert (second / "run" / part).read_bytes() == (first / "run" / part).read_bytes()
    bars = re.findall(r"activations at \S+:\s+(\d+)%", logs[0])
    assert bars
    assert set(bars) == {"100"}


def test_hosts_that_keep_their_own_part_of_the_activations_train_what_one_process_does(hosts, settings, tmp_path):
    unlike_train = ("--l0", "4", "--architectures", "bae", "topk")
    longer = {"600": "7000"}  # in which there are several blocks of 128 contexts
    shared = (longer.get(each, each) for each in settings if each not in unlike_train)
    command = ["train", *shared, "--training-tokens", "660"]
    command += ["--keep-activations", "own", "--sample-tokens", "200", "--set", "dtype", "float64", "target_l0", "4"]
    alone = [sys.executable, "-m", "bae_lens", *command, "--output", str(tmp_path / "alone")]
    subprocess.run(alone, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    own = (tmp_path / "first", tmp_path / "second")
    hosts.start(own, (), *command, "--output", str(hosts.at / "run"))
    codes, logs = hosts.wait()
    assert codes == [0, 0], logs
    runs = [tmp_path / "alone", *(folder / "run" for folder in own)]
    weights = [load_file(run / "dictionaries" / "bae" / "sae_weights.safetensors") for run in runs]
    for name, expected in weights[0].items():
        assert torch.equal(weights[1][name], weights[2][name])
        torch.testing.assert_close(weights[1][name], expected, rtol=0, atol=1e-10)
    kept = [np.load(run / "activations" / "streamed" / "checksums.npy") != 0 for run in runs]
    assert kept[0].all()
    assert (kept[1] ^ kept[2]).all()
    assert min(part.sum() for part in kept) > 100
    assert _result(runs[1])["train"] == _result(runs[0])["train"]


@pytest.mark.parametrize("rendezvous", [(), C10D], ids=["static", "c10d"])
def test_a_run_that_lost_a_process_twice_goes_on_by_itself(hosts, settings, tmp_path, rendezvous):
    shared = tmp_path / "shared"
    command = ["compare", *settings, "--training-tokens", "9900", "--share-steps", "--output", str(hosts.at / "run")]
    hosts.start((shared, shared), ("--max-restarts", "3", *rendezvous), *command)
    hosts.wait_for("training BAE")
    first, second = (_process(name) for name in hosts.names)
    second.kill()
    again = _next_process(hosts.names[1], second)
    again.suspend()
    waiting = _next_process(hosts.names[0], first)
    _until(lambda: _has_socket(waiting))  # then it waits for the other, which has not come
    again.kill()
    codes, logs = hosts.wait()
    assert codes == [0, 0], logs
    assert sum("another process of this run has ended" in log for log in logs) == 1
    assert (shared / "run" / "report.html").exists()
    assert {path.name for path in (shared / "run" / "dictionaries").iterdir()} == {"BAE", "Top-k"}


def _process(name: str) -> psutil.Process:
    (found,) = _processes(name)
    return found


def _next_process(name: str, earlier: psutil.Process) -> psutil.Process:
    return _until(lambda: [process for process in _processes(name) if process != earlier])[0]


def _until(found: Callable[[], T]) -> T:
    """What is found, once it is something."""
    end = time.monotonic() + 120
    while not (what := found()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return what


def _processes(name: str) -> list[psutil.Process]:
    """Those of bae-lens on a host."""
    found = []
    for pid in _pids(name):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            process = psutil.Process(pid)
            if "RANK" in process.environ() and "bae_lens" in process.cmdline():
                found.append(process)
    return found


def _has_socket(process: psutil.Process) -> bool:
    for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            if "socket" in os.readlink(descriptor):
                return True
    return False


def _pids(name: str) -> list[int]:
    return [int(pid) for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True).stdout.split()]


def test_when_the_cable_is_pulled_both_end_within_half_a_minute(hosts, settings, tmp_path):
    command = ["compare", *settings, "--training-tokens", "33000000", "--share-steps"]
    command += ["--output", str(hosts.at / "run")]
    hosts.start((tmp_path / "first", tmp_path / "second"), (), *command)
    hosts.wait_for("training BAE")
    hosts.unplug()
    pulled = time.monotonic()
    codes, logs = hosts.wait()
    assert time.monotonic() - pulled < 30
    assert codes == [1, 1]
    for log in logs:
        assert len(re.findall("error.*: the training of BAE stopped at step .* cannot be reached", log)) == 1


def test_another_version_of_the_package_is_named(hosts, settings, tmp_path):
    shim = tmp_path / "shim"
    shim.mkdir()
    (shim / "sitecustomize.py").write_text(OTHER_VERSION)
    other = {"PYTHONPATH": f"{shim}{os.pathsep}{ROOT}"}
    command = ["compare", *settings, "--output", str(hosts.at / "run")]
    hosts.start((tmp_path / "first", tmp_path / "second"), (), *command, on_second=other)
    codes, logs = hosts.wait()
    assert codes == [1, 1]
    for log in logs:
        assert re.search(r"must be started alike, .* \(bae_lens: '\S+' and '0.0.1'\)", log), log
