"""Runs groups of 1, 2 and 3 processes for `test_distributed.py`: python distributed_scenarios.py MODEL TEXT FOLDER.

A script of its own, which imports once and then forks, because a process that ran pytest cannot be forked safely.
Each process writes what it found to FOLDER/NAME/N-RANK.pt.
"""

import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer

from bae_lens import BAE, BAEConfig, FitSettings, TrainingBAEConfig, TrainingBinaryTranscoderConfig, file_exchange
from bae_lens.activations import batch_order, streaming
from bae_lens.activations.cache import CHECKSUMS_FILE, COMPLETE_FILE, CachedActivations
from bae_lens.activations.cache_writer import cache_activations
from bae_lens.activations.contexts import ContextSettings, choose_contexts, first_contexts
from bae_lens.activations.forward import hook_widths
from bae_lens.activations.models import load_model
from bae_lens.activations.sources import load_text
from bae_lens.activations.streaming import StreamedActivations
from bae_lens.activations.windows import random_windows
from bae_lens.comparison.experiment import Contender, Experiment
from bae_lens.comparison.hooks import compare_hooks
from bae_lens.comparison.run import compare
from bae_lens.comsem.collect import collector
from bae_lens.comsem.collect.corpus import CorpusSettings
from bae_lens.comsem.collect.sampling import SamplingSettings
from bae_lens.distributed import connection, exchange, gradients, homes, joining
from bae_lens.distributed.work import share
from bae_lens.entropy.dynamics import DynamicsSettings, entropy_dynamics
from bae_lens.evaluation import model_loss
from bae_lens.functional import covariance
from bae_lens.functional.sparse_matmul import sums_rows
from bae_lens.storage import open_array
from bae_lens.training import trainer
from bae_lens.training.feature_shards import gathered, own_share
from bae_lens.training.recipe import Recipe, TrainingSettings
from bae_lens.training.trainer import train_dictionary

HOOK = "blocks.0.hook_resid_post"
ROWS = (32, 33, 2, 41)  # of the batches, in turn: neither 2 nor 3 processes share them all equally
SETTINGS = TrainingSettings(training_tokens=33 * 24, batch_size=33)
SIZES: dict[str, Any] = {"d_in": 16, "d_sae": 160, "dtype": "float64"}
PENALTIES: dict[str, Any] = {"entropy_coefficient": 0.5, "covariance_coefficient": 0.1, "tangent_rate": 1.0}
CONFIGS = {
    "sparse": TrainingBAEConfig(**SIZES, **PENALTIES),
    "sparse, sampled": TrainingBAEConfig(**SIZES, **PENALTIES, covariance_sample=80),
    "dense": TrainingBAEConfig(**SIZES, **PENALTIES, apply_encoder_bias=False, encoder_bias_init=0.0),
    "dense, sampled": TrainingBAEConfig(**SIZES, **PENALTIES, covariance_sample=80, encoder_bias_init=-0.5),
    "steered": TrainingBAEConfig(**SIZES, target_l0=8.0, entropy_start_step=5),
    "transcoder": TrainingBinaryTranscoderConfig(**SIZES, **PENALTIES, d_out=7, skip=True),
}
RECIPE = Recipe(TrainingBAEConfig(**{**SIZES, "d_sae": 64}, **PENALTIES, target_l0=8.0), lr=4e-3)


def together(n: int, scenario: Callable[..., Any], *arguments: Any) -> list[int]:
    """Runs the scenario in n processes, and returns how each of them ended."""
    store = folder / f"store-{time.monotonic_ns()}"
    children = []
    for rank in range(n):
        child = os.fork()
        if child == 0:
            os._exit(_joined(n, rank, store, scenario, *arguments))
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _joined(n: int, rank: int, store: Path, scenario: Callable[..., Any], *arguments: Any) -> int:
    try:
        torch.set_num_threads(1)
        if n > 1:
            connection.connect(backend="gloo", init_method=f"file://{store}", rank=rank, world_size=n)
        scenario(*arguments)
        connection.disconnect()
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def write(name: str, found: Any) -> None:
    path = folder / name / f"{connection.n_processes()}-{connection.process_index()}.pt"
    path.parent.mkdir(exist_ok=True)
    torch.save(found, path)


def parts() -> None:
    """The functions of `parallel`, each on data that is the same in all processes."""
    whole = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    own = exchange.shard(whole).clone().requires_grad_()
    gathered = exchange.gather_rows(own)
    gathered.square().sum().backward()
    assert own.grad is not None
    index = connection.process_index()
    uneven = exchange.gather_rows(torch.full((index,), index))
    code = exchange.gather_rows(exchange.shard((whole > 0).double()), sent_as=torch.uint8)
    linear = torch.nn.Linear(4, 1)
    torch.nn.init.zeros_(linear.weight)
    gradients.sum_gradients(linear)
    linear(exchange.shard(whole)).sum().backward()
    assert linear.weight.grad is not None
    write(
        "parts",
        {
            "gathered": gathered.detach(),
            "gradient": exchange.gather_rows(own.grad),
            "rows": len(own),
            "uneven": uneven,
            "code": code,
            "weight": linear.weight.grad[0],
            "sum": exchange.all_reduce_sum(lambda base, part, n_parts: torch.tensor([base + part, n_parts]), 10),
            "any": [exchange.any_process(index == 1, False), exchange.any_process(False, index == 0)],
        },
    )


def train_steps(name: str = "steps", shard_features: bool = False) -> None:
    """24 steps of SAELens' trainer on batches of changing size, with every kind of penalty."""
    found = {}
    with mock.patch.multiple(covariance, TILE=32, BLOCK=16):
        for config, cfg in CONFIGS.items():
            found[config] = _train_steps(cfg, shard_features)
    write(name, found)


def _train_steps(cfg: TrainingBAEConfig, shard_features: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    sae = get_sae_training_class(cfg.architecture())[0](cfg)
    if shard_features:
        sae = own_share(sae)
    settings = SAETrainerConfig(
        total_training_samples=1000, train_batch_size_samples=32, lr=1e-2, lr_end=1e-2, dead_feature_window=3
    )
    trainer = SAETrainer(settings, sae, data_provider=iter(()))
    if shard_features:
        gradients.clip_gradients_together(sae, alike=("b_dec", "W_skip"))
    else:
        gradients.sum_gradients(sae)
    losses, sparse = [], []
    for step in range(24):
        batch = 2 * torch.randn(ROWS[step % len(ROWS)], 16 + getattr(cfg, "d_out", 0), dtype=torch.float64)
        output = trainer.step(batch if shard_features else exchange.shard(batch))
        losses.append(
            [
                torch.as_tensor(value).detach()
                for value in (output.loss, *output.losses.values(), *output.metrics.values())
            ]
        )
        sparse.append(sums_rows(output.feature_acts.detach()))
        trainer.n_training_steps += 1
    if shard_features:
        whole = gathered(trainer, cfg)
        if whole is None:
            return {"losses": torch.tensor(losses, dtype=torch.float64)}
        trainer, sae = whole, whole.sae
    return {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "state": sae.state_dict(),
        "fired": trainer.act_freq_scores,
        "silent": trainer.n_forward_passes_since_fired,
        "sparse": sparse,
    }


def hidden_states(name: str, interrupt_at: int | None = None) -> None:
    """The pass of the language model, in batches of 4 contexts, possibly stopped in the batch of that number."""
    hook_widths(model, [HOOK])
    run, calls = model.run_with_cache, []

    def counted(tokens: Any, **options: Any) -> Any:
        if len(calls) == interrupt_at:
            raise KeyboardInterrupt
        calls.append(len(tokens))
        return run(tokens, **options)

    with mock.patch.object(model, "run_with_cache", counted):
        try:
            states = cache_activations(model, contexts, [HOOK], folder / "states" / name, batch_size=4)[HOOK]
        except (KeyboardInterrupt, ConnectionError):
            return
    write(
        f"cache-{name}",
        {"states": torch.from_numpy(states.activations.copy()), "norms": states.norms, "calls": calls},
    )


@contextmanager
def during_step(step: int, rank: int, action: Callable[[], None]) -> Iterator[None]:
    """Does something in one process while the batch of that step is being fetched."""
    shuffled = CachedActivations.shuffled

    def interrupted(
        self: CachedActivations, batch_size: int, seed: int, start_step: int = 0, device: str = "cpu"
    ) -> Iterator[torch.Tensor]:
        for index, batch in enumerate(shuffled(self, batch_size, seed, start_step, device), start_step):
            if index == step and connection.process_index() == rank:
                action()
            yield batch

    with mock.patch.object(CachedActivations, "shuffled", interrupted):
        yield


def train(name: str, shard_features: bool = False) -> None:
    states = CachedActivations(folder / "states" / "1", HOOK)
    trained = train_dictionary(
        "bae", RECIPE, states, SETTINGS, folder / "trained" / name, shard_features=shard_features
    )
    curve = [list(point.values()) for point in trained.curve]
    write(f"trained-{name}", {"state": trained.sae.state_dict(), "curve": torch.tensor(curve, dtype=torch.float64)})


def interrupted_training(name: str, shard_features: bool = False) -> None:
    """SIGTERM reaches the second process only, in step 11."""
    with during_step(11, 1, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        try:
            train(name, shard_features)
        except KeyboardInterrupt:
            write(
                f"interrupted-{name}", [path.name for path in (folder / "trained" / name / "checkpoints/bae").iterdir()]
            )


def killed_training(name: str) -> None:
    """The second process is killed in step 17; the others must say so at once."""
    start = time.monotonic()
    with (
        during_step(17, 1, lambda: os.kill(os.getpid(), signal.SIGKILL)),
        mock.patch.object(trainer, "CHECKPOINT_SECONDS", 0.0),
    ):
        try:
            train(name)
        except ConnectionError as error:
            write(f"killed-{name}", {"message": str(error), "seconds": time.monotonic() - start})


def lists() -> None:
    """Items that take unlike times, one of which is done already."""
    done = folder / "lists" / str(connection.n_processes())
    if connection.is_main_process():
        done.mkdir(parents=True)
    exchange.barrier()

    def work(item: int) -> None:
        time.sleep(0.02 * item)
        (done / f"{item} by {launched_as()} among {connection.n_processes()}").touch()

    share(range(7), work)
    seen = sorted(path.name for path in done.iterdir())
    share([], work)
    write("lists", {"seen": seen, "gathered": exchange.gather({"rank": connection.process_index()})})


def launched_as() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def shared_folders(name: str, machines: list[int], folders: list[str]) -> None:
    """What each finds out of which of the machines share a folder."""
    rank = connection.process_index()
    own = folder / "homes" / name / folders[rank]
    own.mkdir(parents=True, exist_ok=True)
    try:
        homes.find_homes(own, machines[rank])
    except ValueError as error:
        write(f"homes-{name}", str(error))
        return
    first = homes.is_first_at_home()
    write(f"homes-{name}", (homes.n_homes(), homes.home_index(), first, homes.place_at_home()))


def apart() -> Path:
    """A folder for each of two processes, as on machines that share none."""
    own = folder / "apart" / str(connection.n_processes()) / str(connection.process_index())
    own.mkdir(parents=True, exist_ok=True)
    homes.find_homes(own, connection.process_index())
    return own


def files_apart() -> None:
    own, rank = apart(), connection.process_index()
    run = own / "run"
    for path, content in {
        "result.json": "main's" if rank == 0 else None,
        f"dictionaries/{rank}/weights": f"weights {rank}" * (rank + 1),
        f"dictionaries/{rank}/cfg.json": "",
        "activations/train/activations.npy": f"{rank}",
        ".lock": f"{rank}",
        "seeds/1/dictionaries/a/cfg.json": "second" if rank == 1 else None,
        "same.json": f"that of {rank}",
    }.items():
        if content is not None:
            (run / path).parent.mkdir(parents=True, exist_ok=True)
            (run / path).write_text(content)
    with mock.patch.object(file_exchange, "PIECE_BYTES", 5):
        file_exchange.bring_together(run)
    paths = (path for path in run.rglob("*") if path.is_file())
    write("files-apart", {str(path.relative_to(run)): path.read_text() for path in paths})


def cache_apart(name: str, copied_to: tuple[int, ...]) -> None:
    """The cache of a single process, some contexts of which are damaged, lies on some of the machines."""
    own = apart() / name
    if connection.process_index() in copied_to:
        shutil.copytree(folder / "states" / "1", own)
        sums = open_array(own / HOOK / CHECKSUMS_FILE)
        sums[4 * connection.process_index()] = 0  # in another batch on each
        sums.flush()
        (own / COMPLETE_FILE).unlink()
    exchange.barrier()
    hook_widths(model, [HOOK])
    run, calls = model.run_with_cache, []

    def counted(tokens: Any, **options: Any) -> Any:
        calls.append(len(tokens))
        return run(tokens, **options)

    with mock.patch.object(model, "run_with_cache", counted):
        states = cache_activations(model, contexts, [HOOK], own, batch_size=4)[HOOK]
    write(
        f"cache-apart-{name}",
        {"states": torch.from_numpy(states.activations.copy()), "norms": states.norms, "calls": calls},
    )


def streamed_training(name: str, keeps_own: bool, shares_folder: bool = True, stop_at: int | None = None) -> None:
    """In windows of four blocks of two contexts, of which the first 13 are the sample; possibly stopped in a step."""
    run = folder / "streamed" / name if shares_folder else apart() / name
    with mock.patch.object(streaming, "BLOCK_ROWS", 40), mock.patch.object(batch_order, "WINDOW_BLOCKS", 4):
        sample = cache_activations(model, first_contexts(contexts, 195, [0]), [HOOK], run / "sample", batch_size=4)
        stream = StreamedActivations(model, contexts, sample[HOOK], run / "stream", keeps_own=keeps_own)
        with mock.patch.object(trainer, "take_step", _stopping(stop_at)):
            try:
                trained = train_dictionary("bae", RECIPE, stream, SETTINGS, run)
            except KeyboardInterrupt:
                return
    kept = run / "stream" / "checksums.npy"
    write(
        f"streamed-{name}",
        {
            "state": trained.sae.state_dict(),
            "curve": torch.tensor([list(point.values()) for point in trained.curve], dtype=torch.float64),
            "seen": stream._seen,
            "norms": stream.relative_norms,
            "kept": torch.from_numpy(open_array(kept) != 0) if kept.exists() else None,
        },
    )


def _stopping(stop_at: int | None) -> Callable[..., Any]:
    """Steps in which the second process, or the only one, is told to end in that of a number."""
    steps, take_step = iter(range(10**6)), trainer.take_step

    def step(*arguments: Any) -> Any:
        if next(steps) == stop_at and connection.process_index() == connection.n_processes() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(*arguments)

    return step


def compared(name: str, share_steps: bool) -> None:
    """Two dictionaries, two trials, two seeds."""
    settings = {"context_size": 16, "cached_tokens": 600, "held_out_tokens": 200, "tuning_tokens": 100}
    experiment = Experiment(
        "tiny",
        "words",
        HOOK,
        contexts=ContextSettings(**settings, loss_contexts=9),
        training=SETTINGS,
        l0=4.0,
        seeds=(0, 1),
    )
    bae = TrainingBAEConfig(d_in=16, d_sae=32, target_l0=4.0)
    contenders = {
        "BAE": Contender((Recipe(bae, 6e-3), Recipe(bae, 3e-3))),
        "Top-k": Contender(tuple(Recipe(TopKTrainingSAEConfig(d_in=16, d_sae=32, k=k), 1e-3) for k in (4, 6))),
    }
    with mock.patch.object(model_loss, "TOKENS_PER_PASS", 32):
        run = folder / "compared" / name
        found = compare(model, documents, contenders, experiment, run, share_steps=share_steps)
    write(f"compared-{name}", without_times(found.to_dict()))


def at_hooks(name: str) -> None:
    """Two dictionaries at each of three hooks, of which two processes share two, and then the work on the third."""
    experiment = Experiment(
        "tiny",
        "words",
        HOOK,
        contexts=ContextSettings(context_size=16, cached_tokens=600, held_out_tokens=100, loss_contexts=4),
        training=TrainingSettings(training_tokens=33 * 4, batch_size=33),
        every_help=False,
    )
    contenders = {
        "BAE": Contender((Recipe(TrainingBAEConfig(d_in=16, d_sae=32, target_l0=4.0), 6e-3),)),
        "Top-k": Contender((Recipe(TopKTrainingSAEConfig(d_in=16, d_sae=32, k=4), 1e-3),)),
    }
    hooks = [HOOK, "blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out"]
    measured: list[str] = []
    result = compare_hooks(
        model,
        documents,
        dict.fromkeys(hooks, contenders),
        experiment,
        folder / "hooks" / name,
        on_measured=lambda measured_one, _: measured.append(measured_one),
    )
    write(f"hooks-{name}", {"result": without_times(result.to_dict()), "measured": measured})


def without_times(content: Any) -> Any:
    """A result without what another run need not repeat."""
    times = {"seconds", "training_seconds", "memory_gib", "stages"}
    if isinstance(content, dict):
        return {key: without_times(value) for key, value in content.items() if key not in times}
    return [without_times(value) for value in content] if isinstance(content, list) else content


def dynamics(name: str) -> None:
    windows = random_windows(model.tokenizer, documents, 4, 80, per_document=4)
    settings = DynamicsSettings(8, (0.1, 1.0), fit=FitSettings(steps=8, batch_size=16))
    hooks = [HOOK, "blocks.1.hook_resid_post", "blocks.1.hook_resid_pre"]
    found = entropy_dynamics(model, windows, hooks, [1, 2, 4], settings, folder / "dynamics" / name)
    write(f"dynamics-{name}", found.to_dict())


def instances() -> None:
    """What ComSem collects for a binary dictionary and one that is not."""
    torch.manual_seed(0)
    dictionaries = {
        "bae": BAE(BAEConfig(d_in=16, d_sae=32)),
        "topk": TopKTrainingSAE(TopKTrainingSAEConfig(d_in=16, d_sae=32, k=4)),
    }
    for sae in dictionaries.values():
        torch.nn.init.normal_(sae.W_enc)
        sae.cfg.metadata.hook_name = HOOK
    settings = (CorpusSettings(tokens=900, context_size=16), SamplingSettings(examples=2, held_out=2))
    with mock.patch.object(collector, "CONTEXTS_PER_BATCH", 3):
        write("instances", asdict(collector.collect(model, dictionaries, documents, *settings)))


def silent() -> None:
    """The last of three processes stops without a word while one waits for it and one is at work."""
    place, start, rank = folder / "silent-process", time.monotonic(), connection.process_index()
    if rank == 2:
        place.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    signal.signal(signal.SIGTERM, joining._told_to_end)
    try:
        exchange.barrier() if rank == 0 else time.sleep(60)
    except ConnectionError as error:
        write("silent", {"message": str(error), "seconds": time.monotonic() - start})
    if rank == 0:
        os.kill(int(place.read_text()), signal.SIGKILL)
    os._exit(0)


def main() -> None:
    found: dict[str, list[int]] = {}
    for n in (1, 2, 3):
        found[f"parts {n}"] = together(n, parts)
        found[f"steps {n}"] = together(n, train_steps)
        found[f"cache {n}"] = together(n, hidden_states, str(n))
        found[f"train {n}"] = together(n, train, str(n))
        found[f"lists {n}"] = together(n, lists)
        found[f"compared {n}"] = together(n, compared, str(n), False)
        found[f"hooks {n}"] = together(n, at_hooks, str(n))
        found[f"dynamics {n}"] = together(n, dynamics, str(n))
        found[f"instances {n}"] = together(n, instances)
    found["compared, sharing steps"] = together(2, compared, "sharing", True)
    shared = {"one machine": ([0, 0, 0], "aaa"), "shared": ([0, 1, 1], "aaa"), "apart": ([0, 1, 1], "abb")}
    for name, (machines, folders) in {**shared, "mixed": ([0, 1, 2], "aab")}.items():
        found[f"homes {name}"] = together(3, shared_folders, name, machines, list(folders))
    found["files apart"] = together(2, files_apart)
    for name, copied_to in {"nowhere": (), "on the first": (0,), "on the second": (1,), "on both": (0, 1)}.items():
        found[f"cache {name}"] = together(2, cache_apart, name, copied_to)
    found["cache interrupted"] = together(2, hidden_states, "cut", 3)
    found["cache resumed"] = together(3, hidden_states, "cut")
    for n in (1, 3):
        found[f"train interrupted for {n}"] = together(2, interrupted_training, f"from-2-to-{n}")
        found[f"train resumed by {n}"] = together(n, train, f"from-2-to-{n}")
    for n in (2, 3):
        found[f"feature steps {n}"] = together(n, train_steps, "feature-steps", True)
        found[f"train features {n}"] = together(n, train, f"features-{n}", True)
    for n in (1, 3):
        found[f"train features interrupted for {n}"] = together(
            2, interrupted_training, f"features-from-2-to-{n}", True
        )
        found[f"train features resumed by {n}"] = together(n, train, f"features-from-2-to-{n}", True)
    for n in (1, 2):
        found[f"streamed by {n}"] = together(n, streamed_training, f"{n}", False)
    for stop_at in (21, None):
        found[f"streamed, stopped at {stop_at}"] = together(
            2 if stop_at else 3, streamed_training, "cut", True, True, stop_at
        )
    found["streamed apart"] = together(2, streamed_training, "apart", True, False)
    found["train rows interrupted"] = together(2, interrupted_training, "from-rows-to-features")
    found["train features resumed from rows"] = together(2, train, "from-rows-to-features", True)
    found["train killed"] = together(3, killed_training, "killed")
    found["train resumed after kill"] = together(2, train, "killed")
    with mock.patch.multiple(connection, SILENCE=timedelta(seconds=2), BEAT_SECONDS=0.1):
        found["silent"] = together(3, silent)
    torch.save(found, folder / "exits.pt")


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    model_folder, text, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    model = load_model(model_folder, "cpu")
    documents = load_text(text, "text", "train")
    tokens = ContextSettings(context_size=16, cached_tokens=600, held_out_tokens=120)
    contexts = choose_contexts(model.tokenizer, documents, tokens)["train"]
    main()
