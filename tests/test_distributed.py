import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from sae_lens import TopKTrainingSAEConfig
from safetensors.torch import load_file

from bae_lens import TrainingBAEConfig
from bae_lens.cli import main as cli
from bae_lens.distributed import connection
from bae_lens.distributed.connection import connect, finish, is_main_process, naming_the_cause
from bae_lens.distributed.exchange import any_process, gather, gather_rows, shard
from bae_lens.distributed.homes import is_first_at_home, n_homes
from bae_lens.distributed.joining import check_alike, joined
from bae_lens.distributed.work import share
from bae_lens.training.trainer import check_processes

SMALL = "--cached-tokens 600 --held-out-tokens 120 --context-size 16 --training-tokens 660 --batch-size 33"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Any) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.jsonl"
    path.write_text("\n".join(json.dumps({"text": line}) for line in tiny_dataset["text"][:400]))
    return path


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, text: Path
) -> Callable[[str, int], list[Any]]:
    """What each of n processes wrote in a scenario of `distributed_scenarios.py`, which is run once."""
    folder = tmp_path_factory.mktemp("processes")
    script = Path(__file__).parent / "distributed_scenarios.py"
    done = _run(sys.executable, str(script), str(tiny_model_folder), str(text), str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    exits = torch.load(folder / "exits.pt")
    assert exits.pop("train killed") == [0, -9, 0]
    assert exits.pop("silent") == [0, 0, -9]
    assert all(set(codes) == {0} for codes in exits.values()), done.stderr[-3000:]

    def load(scenario: str, n: int) -> list[Any]:
        paths = sorted((folder / scenario).glob(f"{n}-*.pt"))
        return [torch.load(path) for path in paths]

    return load


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parent.parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-10)


def launched(monkeypatch, **environment: str) -> None:
    values = {"TORCHELASTIC_RUN_ID": "0", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", **environment}
    for name, value in values.items():
        monkeypatch.setenv(name, value)


class TestAlone:
    def test_nothing_is_shared(self, tmp_path):
        rows = torch.randn(3, 2)
        assert torch.equal(shard(rows), rows)
        assert gather_rows(rows, sent_as=torch.uint8) is rows
        assert any_process(True, False) == (True, False)
        assert is_main_process()
        assert is_first_at_home()
        assert n_homes() == 1
        assert gather("own") == ["own"]
        done: list[int] = []
        share([3, 1], done.append)
        assert done == [3, 1]
        with joined("cpu", tmp_path / "absent", {}) as device:
            assert device == "cpu"
        assert not (tmp_path / "absent").exists()

    def test_launched_processes_take_a_gpu_each(self, monkeypatch, tmp_path):
        calls = []
        launched(monkeypatch, LOCAL_WORLD_SIZE="2", GROUP_RANK="3")
        monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
        monkeypatch.setattr("torch.cuda.set_device", calls.append)
        monkeypatch.setattr("bae_lens.distributed.joining.connect", lambda backend: calls.append(backend))
        monkeypatch.setattr("bae_lens.distributed.joining.find_homes", lambda _, machine: calls.append(machine))
        monkeypatch.setattr("bae_lens.distributed.joining.disconnect", lambda: calls.append("parted"))
        with joined("cuda", tmp_path, {}) as device:
            assert device == "cuda:1"
        assert calls == ["cuda:1", "cpu:gloo,cuda:nccl", 3, "parted"]

    def test_fewer_gpus_than_processes_are_refused(self, monkeypatch, tmp_path):
        launched(monkeypatch, WORLD_SIZE="4", LOCAL_WORLD_SIZE="2")
        monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
        with (
            pytest.raises(ValueError, match="2 processes on a machine need as many GPUs, but there are 1"),
            joined("cuda", tmp_path, {}),
        ):
            pass

    def test_process_that_does_not_come_is_not_waited_for_without_end(self, monkeypatch, tmp_path):
        monkeypatch.setattr("bae_lens.distributed.connection.JOIN_TIMEOUT", timedelta(seconds=1))
        with pytest.raises(ConnectionError, match="another process of this run has ended or cannot be reached"):
            connect(backend="gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=2)
        assert not torch.distributed.is_initialized()

    def test_an_exchange_that_is_done_just_when_it_counts_as_late_is_done(self):
        class Exchange:
            waited = 0

            def wait(self, *timeout):
                self.waited += 1
                if timeout:
                    raise RuntimeError("Operation timed out!")

            def is_completed(self):
                return True

        exchange = Exchange()
        finish(lambda *_, **__: exchange, torch.zeros(1))
        assert exchange.waited == 2

    @pytest.mark.parametrize(
        "shortage",
        [
            torch.OutOfMemoryError("CUDA out of memory"),
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        ],
    )
    def test_memory_that_is_too_little_is_no_broken_connection(self, shortage):
        with pytest.raises(type(shortage), match="memory"), naming_the_cause():
            raise shortage

    def test_a_group_of_others_is_left_alone(self, monkeypatch):
        monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
        monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
        rows = torch.randn(3, 2)
        assert gather_rows(rows) is rows


class TestNamesOfStarts:
    @pytest.fixture
    def store(self, monkeypatch):
        monkeypatch.setattr(connection, "JOIN_TIMEOUT", timedelta(seconds=20))
        return torch.distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]

    @staticmethod
    def come(store, *ranks):
        with ThreadPoolExecutor() as pool:
            return list(pool.map(lambda rank: connection._agreed_name(store, rank, 2), ranks))

    def test_all_processes_of_a_start_have_its_name_and_those_of_the_next_another(self, store):
        first, second = self.come(store, 0, 1), self.come(store, 1, 0)
        assert first == 2 * [first[0]]
        assert second == 2 * [second[0]]
        assert first[0] != second[0]

    def test_a_process_that_ended_while_it_waited_is_not_one_of_them(self, store):
        store.set("process 1 of 2", "dead")
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(connection._agreed_name, store, 0, 2)
            while (
                not store.check(["process 0 of 2"]) or store.add(f"{store.get('process 0 of 2').decode()} dead", 0) < 1
            ):
                time.sleep(0.01)
            (name,) = self.come(store, 1)
            assert waiting.result() == name
        assert "dead" not in name

    def test_a_process_whose_place_is_taken_ends(self, store):
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(connection._agreed_name, store, 0, 2)
            while not store.check(["process 0 of 2"]):
                time.sleep(0.01)
            name = store.get("process 0 of 2")
            instead = pool.submit(connection._agreed_name, store, 0, 2)
            while store.get("process 0 of 2") == name:
                time.sleep(0.01)
            assert self.come(store, 1) == [instead.result()]
            with pytest.raises(ConnectionError, match=r"has ended or .* \(another one has come as process 0 of 2\)"):
                waiting.result()


@pytest.mark.parametrize("n", [1, 2, 3])
class TestParts:
    def test_rows_are_shared_in_order_and_gathered_with_their_gradient(self, found, n):
        whole = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
        parts = found("parts", n)
        assert [part["rows"] for part in parts] == {1: [7], 2: [4, 3], 3: [3, 2, 2]}[n]
        for part in parts:
            assert torch.equal(part["gathered"], whole)
            assert torch.equal(part["gradient"], 2 * whole)
            assert torch.equal(part["code"], (whole > 0).double())

    def test_processes_may_have_different_numbers_of_rows_and_none(self, found, n):
        for part in found("parts", n):
            assert part["uneven"].tolist() == [index for index in range(n) for _ in range(index)]

    def test_gradients_are_summed_and_parts_added(self, found, n):
        whole = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
        for part in found("parts", n):
            torch.testing.assert_close(part["weight"], whole.sum(0))
            assert part["sum"].tolist() == [sum(10 + index for index in range(n)), n * n]

    def test_what_holds_in_one_process_is_known_to_all(self, found, n):
        for part in found("parts", n):
            assert part["any"] == [(n > 1, False), (False, True)]


CONFIGS = ["sparse", "sparse, sampled", "dense", "dense, sampled", "steered", "transcoder"]


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("config", CONFIGS)
def test_losses_weights_and_statistics_are_those_of_a_single_process(found, config, n):
    (single,) = found("steps", 1)
    expected = single[config]
    for process in found("steps", n):
        assert_close({"losses": process[config]["losses"]}, {"losses": expected["losses"]})
        assert_close(process[config]["state"], expected["state"])
        assert torch.equal(process[config]["fired"], expected["fired"])
        assert torch.equal(process[config]["silent"], expected["silent"])


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("config", CONFIGS)
def test_where_features_are_shared_all_is_that_of_a_single_process_too(found, config, n):
    (single,) = found("steps", 1)
    first, *others = found("feature-steps", n)
    for process in (first, *others):
        assert_close({"losses": process[config]["losses"]}, {"losses": single[config]["losses"]})
    assert_close(first[config]["state"], single[config]["state"])
    for name in ("fired", "silent"):
        assert torch.equal(first[config][name], single[config][name])


def test_both_ways_of_the_covariance_and_both_kinds_of_penalty_were_taken(found):
    (single,) = found("steps", 1)
    assert any(single["sparse"]["sparse"])
    assert any(single["sparse, sampled"]["sparse"])
    assert not any(single["dense"]["sparse"])
    assert not any(single["dense, sampled"]["sparse"])
    for name in ("sparse", "dense", "transcoder"):
        _, mse, entropy, covariance, *_ = single[name]["losses"].T
        assert (entropy > 0.02 * mse).all()
        assert (covariance > 0.02 * mse).double().mean() > 0.8  # a batch of two rows may have none
    assert single["steered"]["state"]["entropy_multiplier"] != 1


@pytest.mark.parametrize("n", [2, 3])
def test_hidden_states_are_those_of_a_single_process_and_each_batch_is_computed_once(found, n):
    (single,) = found("cache-1", 1)
    shared = found(f"cache-{n}", n)
    for process in shared:
        assert torch.equal(process["states"], single["states"])
        assert torch.equal(process["norms"], single["norms"])
        assert sum(process["calls"]) < 0.6 * sum(single["calls"])
    assert sum(sum(process["calls"]) for process in shared) == sum(single["calls"])


def test_interrupted_pass_goes_on_with_another_number_of_processes(found):
    (single,) = found("cache-1", 1)
    resumed = found("cache-cut", 3)
    assert sum(sum(process["calls"]) for process in resumed) == sum(single["calls"]) - 2 * 3 * 4
    for process in resumed:
        assert torch.equal(process["states"], single["states"])
        assert torch.equal(process["norms"], single["norms"])


@pytest.mark.parametrize("n", [2, 3])
def test_trained_dictionary_is_that_of_a_single_process(found, n):
    (single,) = found("trained-1", 1)
    for process in found(f"trained-{n}", n):
        assert_close(process["state"], single["state"])
        assert_close({"curve": process["curve"]}, {"curve": single["curve"]})


@pytest.mark.parametrize(("name", "n"), [("2", 2), ("cut", 3), ("apart", 2)])
def test_streamed_activations_train_what_a_single_process_does(found, name, n):
    (single,) = found("streamed-1", 1)
    processes = found(f"streamed-{name}", n)
    for process in processes:
        assert_close(process["state"], single["state"])
        assert_close({"curve": process["curve"]}, {"curve": single["curve"]})
        assert torch.equal(process["norms"], single["norms"])
        assert process["seen"].all()
    if name == "apart":  # each has its part of the contexts, and no other, on the disk
        first, second = (process["kept"] for process in processes)
        assert torch.equal(first, ~second)
        assert torch.equal(first[:8], torch.tensor([True, True, False, False] * 2))


@pytest.mark.parametrize("n", [1, 3])
def test_signal_to_one_process_stops_both_and_another_number_goes_on(found, n):
    assert found(f"interrupted-from-2-to-{n}", 2) == [["00000012"]] * 2
    (single,) = found("trained-1", 1)
    for process in found(f"trained-from-2-to-{n}", n):
        assert_close(process["state"], single["state"])
        assert_close({"curve": process["curve"]}, {"curve": single["curve"]})


@pytest.mark.parametrize(
    ("name", "n"),
    [
        ("features-2", 2),
        ("features-3", 3),
        ("features-from-2-to-1", 1),
        ("features-from-2-to-3", 3),
        ("from-rows-to-features", 2),
    ],
)
def test_dictionary_whose_features_were_shared_is_that_of_a_single_process_after_an_interruption_too(found, name, n):
    (single,) = found("trained-1", 1)
    for process in found(f"trained-{name}", n):
        assert_close(process["state"], single["state"])
        assert_close({"curve": process["curve"]}, {"curve": single["curve"]})


def test_killed_process_stops_the_others_with_what_to_do_and_two_go_on(found):
    messages = found("killed-killed", 3)
    assert len(messages) == 2
    for message in messages:
        assert message["message"].startswith("the training of bae stopped at step 17: another process of this run has")
        assert message["message"].endswith("goes on from step 17, where it was last saved")
        assert message["seconds"] < 15
    (single,) = found("trained-1", 1)
    for process in found("trained-killed", 2):
        assert_close(process["state"], single["state"])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_each_item_of_a_list_is_worked_on_once_by_a_process_that_is_alone(found, n):
    for part in found("lists", n):
        assert [name.split(" by ")[0] for name in part["seen"]] == [str(item) for item in range(7)]
        assert all(name.endswith(" among 1") for name in part["seen"])
        assert len({name.split()[2] for name in part["seen"]}) == n
        assert part["gathered"] == [{"rank": rank} for rank in range(n)]


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("scenario", ["compared", "dynamics"])
def test_results_are_those_of_a_single_process_to_the_last_digit(found, scenario, n):
    (single,) = found(f"{scenario}-1", 1)
    for process in found(f"{scenario}-{n}", n):
        assert process == single


@pytest.mark.parametrize("n", [2, 3])
def test_hooks_are_shared_and_the_result_is_that_of_a_single_process_to_the_last_digit(found, n):
    (single,) = found("hooks-1", 1)
    processes = found(f"hooks-{n}", n)
    for process in processes:
        assert process["result"] == single["result"]
    told = [process["measured"] for process in processes]
    assert sorted(name for each in told for name in each) == sorted(single["measured"])
    assert all(len({name.split(" at ")[1] for name in each[:2]}) == 1 for each in told)  # all of a hook to begin with


@pytest.mark.parametrize("n", [2, 3])
def test_instances_are_those_of_a_single_process(found, n):
    (single,) = found("instances", 1)
    assert single["n_tokens"] > 500
    assert all(dictionary["features"] for dictionary in single["dictionaries"].values())
    for process in found("instances", n):
        assert process == single


def test_steps_are_shared_where_they_can_be(found):
    (single,) = found("compared-1", 1)
    for process in found("compared-sharing", 2):
        for name, shared, alone in zip(("BAE", "Top-k"), process["dictionaries"], single["dictionaries"], strict=True):
            explained = [[run["metrics"]["explained_variance"] for run in found["runs"]] for found in (shared, alone)]
            assert explained[0] == (pytest.approx(explained[1], abs=1e-2) if name == "BAE" else explained[1])


def test_homes_are_the_folders_that_machines_see(found):
    assert found("homes-one machine", 3) == [(1, 0, True, (0, 3)), (1, 0, False, (1, 3)), (1, 0, False, (2, 3))]
    assert found("homes-shared", 3) == found("homes-one machine", 3)
    assert found("homes-apart", 3) == [(2, 0, True, (0, 1)), (2, 1, True, (0, 2)), (2, 1, False, (1, 2))]
    for message in found("homes-mixed", 3):
        assert re.search("must be shared by all machines or by none, but 2 share it and number 2 does not", message)


def test_machines_end_with_the_same_files_but_for_caches_and_hidden_ones(found):
    everyones = {
        "result.json": "main's",
        "dictionaries/0/weights": "weights 0",
        "dictionaries/0/cfg.json": "",
        "dictionaries/1/weights": "weights 1weights 1",
        "dictionaries/1/cfg.json": "",
        "seeds/1/dictionaries/a/cfg.json": "second",
    }
    for rank, files in enumerate(found("files-apart", 2)):
        own = {".lock": f"{rank}", "activations/train/activations.npy": f"{rank}", "same.json": f"that of {rank}"}
        assert files == {**everyones, **own}


@pytest.mark.parametrize(
    ("where", "computed"), [("nowhere", None), ("on the first", 4), ("on the second", 4), ("on both", 0)]
)
def test_what_a_machine_has_cached_is_brought_to_the_others_and_not_computed(found, where, computed):
    (single,) = found("cache-1", 1)
    apart = found(f"cache-apart-{where}", 2)
    assert sum(sum(process["calls"]) for process in apart) == (sum(single["calls"]) if computed is None else computed)
    for process in apart:
        assert torch.equal(process["states"], single["states"])
        assert torch.equal(process["norms"], single["norms"])


def test_a_process_that_is_silent_is_lost_to_those_that_wait_and_those_at_work(found):
    told = found("silent", 3)
    assert len(told) == 2
    for process in told:
        assert process["message"].startswith("another process of this run has ended or cannot be reached (")
        assert process["seconds"] < 8


class TestEndingTogether:
    def test_a_single_process_is_like_itself(self):
        check_alike({"lr": 0.1})

    def test_what_differs_is_named_in_the_order_of_processes(self, monkeypatch):
        monkeypatch.setattr(
            "bae_lens.distributed.joining.gather", lambda own: [{**own, "lr": "0.1", "output": "'a'"}, own]
        )
        check_alike({"lr": 0.1, "output": "a"})
        with pytest.raises(ValueError, match=r"must be started alike, .* \(lr: 0.1 and 0.2; output: 'a' and nothing\)"):
            check_alike({"lr": 0.2})

    def test_another_version_of_the_package_is_a_difference(self, monkeypatch):
        monkeypatch.setattr("bae_lens.distributed.joining.gather", lambda own: [{**own, "bae_lens": "'0.0.1'"}, own])
        with pytest.raises(ValueError, match=r"must be started alike, .* \(bae_lens: '0.0.1' and '\d"):
            check_alike({"lr": 0.1})

    def test_a_process_that_is_told_to_end_says_what_goes_on_unless_it_has_an_error_of_its_own(
        self, monkeypatch, tmp_path
    ):
        launched(monkeypatch, LOCAL_WORLD_SIZE="2", GROUP_RANK="0")
        for name in ("connect", "find_homes", "disconnect"):
            monkeypatch.setattr(f"bae_lens.distributed.joining.{name}", lambda *_, **__: None)
        before = signal.getsignal(signal.SIGTERM)
        with joined("cpu", tmp_path, {}):
            with pytest.raises(ConnectionError, match=r"this process was told to end, .* goes on from what is"):
                os.kill(os.getpid(), signal.SIGTERM)
            try:
                raise ConnectionError("its own")
            except ConnectionError:
                os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is before


class TestRefusals:
    def test_processes_share_the_steps_of_a_binary_code_only(self, monkeypatch):
        bae, topk = TrainingBAEConfig(d_in=4, d_sae=8), TopKTrainingSAEConfig(d_in=4, d_sae=8)
        check_processes("any", topk)
        monkeypatch.setattr("bae_lens.training.trainer.n_processes", lambda: 2)
        check_processes("mine", bae)
        with pytest.raises(ValueError, match=r"2 processes cannot share the steps of mine, a topk dictionary"):
            check_processes("mine", topk)

    def test_other_commands_refuse_torchrun(self, monkeypatch, capsys):
        for name, value in {"TORCHELASTIC_RUN_ID": "0", "WORLD_SIZE": "2", "RANK": "1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["bae-lens", "entropy"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
        output = capsys.readouterr()
        assert output.err.startswith("error in process 1: torchrun started 2 processes, which share demo, train, ")
        assert "but not entropy; run it without torchrun" in output.err
        assert output.out == ""


@pytest.mark.slow
def test_torchrun_trains_what_one_process_trains_and_says_it_once(tiny_model_folder, text, tmp_path):
    command = ["-m", "bae_lens", "train", "--model", str(tiny_model_folder), "--dataset", str(text), *SMALL.split()]
    command += ["--hook-name", "blocks.0.hook_resid_post", "--set", "covariance_coefficient", "0.01"]
    for run, *flags in (["rows"], ["features", "--shard-features"]):
        shared = _run(*TORCHRUN, *command, *flags, "--output", str(tmp_path / run))
        assert shared.returncode == 0, shared.stderr[-3000:]
        assert shared.stdout.count("\nbae  ") == 1
        assert (tmp_path / run / "report.html").exists()
    assert _run(sys.executable, *command, "--output", str(tmp_path / "one")).returncode == 0
    one, *others = (
        load_file(tmp_path / run / "dictionaries" / "bae" / "sae_weights.safetensors")
        for run in ("one", "rows", "features")
    )
    for two in others:
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_torchrun_shows_help_once_and_fails_if_a_process_does(tiny_model_folder, text, tmp_path):
    help_text = _run(*TORCHRUN, "-m", "bae_lens", "train", "--help")
    assert (help_text.returncode, help_text.stdout.count("usage: bae-lens train")) == (0, 1)
    command = ["-m", "bae_lens", "train", "--model", str(tiny_model_folder), "--dataset", str(text), *SMALL.split()]
    command += ["--architecture", "topk", "--set", "k", "4", "--output", str(tmp_path / "run"), "--hook-name"]
    refused = _run(*TORCHRUN, *command, "blocks.9.hook_resid_post")
    assert refused.returncode == 1
    assert "error: the model has no hook 'blocks.9.hook_resid_post'" in refused.stderr
    unknown = _run(*TORCHRUN, "-m", "bae_lens", "comsem", str(tmp_path / "run" / "TYPO"))
    assert "score dictionaries that are in none in one process" in unknown.stderr
    assert not (tmp_path / "run").exists()
    of_one = _run(*TORCHRUN, *command, "blocks.0.hook_resid_post")
    assert of_one.returncode == 0, of_one.stderr[-3000:]
    assert of_one.stdout.count("\ntopk  ") == 1


def _unlike(tmp_path: Path, command: list[str], *other: str) -> list[str]:
    """A command that torchrun starts with further arguments in the second process."""
    script = tmp_path / "unlike.py"
    script.write_text(
        "import os, sys\n"
        "if os.environ['RANK'] == '1': sys.argv += " + repr(list(other)) + "\n"
        "from bae_lens.cli.main import main\n"
        "main()\n"
    )
    return [*TORCHRUN, str(script), *command]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (("--lr", "0.5"), "lr: None and 0.5"),
        (("--training-tokens", "330"), "training.training_tokens: 660 and 330"),
        (("--batch-size", "66"), "training.batch_size: 33 and 66"),
        (("--seed", "1"), "seed: 0 and 1"),
        (("--output", "elsewhere"), r"output: .* and PosixPath\('elsewhere'\)"),
        (
            ("--hook-name", "blocks.1.hook_resid_post"),
            r"hook_name: \('blocks.0.hook_resid_post',\) and \('blocks.1.hook_",
        ),
        (("--set", "target_l0", "8"), r"set: {} and nothing; set.target_l0: nothing and '8'"),
    ],
)
def test_processes_that_are_started_unlike_end_at_once_with_the_difference(
    tiny_model_folder, text, tmp_path, other, difference
):
    command = ["train", "--model", str(tiny_model_folder), "--dataset", str(text), *SMALL.split()]
    command += ["--hook-name", "blocks.0.hook_resid_post", "--output", str(tmp_path / "run")]
    refused = _run(*_unlike(tmp_path, command, *other))
    assert refused.returncode == 1
    assert re.search(f"the processes must be started alike, .*{difference}", refused.stderr)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_when_the_first_process_is_killed_the_other_says_where_to_go_on(tiny_model_folder, text, tmp_path):
    command = ["-m", "bae_lens", "train", "--model", str(tiny_model_folder), "--dataset", str(text), *SMALL.split()]
    command += ["--hook-name", "blocks.0.hook_resid_post", "--output", str(tmp_path / "run")]
    command += ["--training-tokens", "33000000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    running = subprocess.Popen([*TORCHRUN, *command], env=environment, stderr=subprocess.PIPE, text=True)
    first, shown = None, ""
    assert running.stderr is not None
    while "training bae" not in shown and (part := running.stderr.read(1)):
        shown += part
    for child in psutil.Process(running.pid).children():
        if child.environ().get("RANK") == "0":
            first = child
    assert first is not None
    first.kill()
    killed = time.monotonic()
    shown += running.communicate(timeout=120)[1]
    assert time.monotonic() - killed < 60
    assert running.returncode == 1
    assert re.search(r"error in process 1: the training of bae stopped at step \d+: another process of this run", shown)
    assert "the same command, with any number of processes, goes on from step 0" in shown
