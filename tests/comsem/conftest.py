import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import HookedSAETransformer, StandardSAE, StandardSAEConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens import HookedTransformerConfig
from transformers import PreTrainedTokenizerFast

from bae_lens import BAE, BAEConfig, ComSem, ComSemReport
from bae_lens.comsem.collect.corpus import CorpusSettings
from bae_lens.comsem.collect.instances import Excerpt, Instance
from bae_lens.comsem.judges.judge import Choice, Prediction, Question, Verdict

SPECIAL_TOKENS = ("<bos>", "<eos>", "<pad>", "<unk>")
DIGITS = tuple("12345")
WORDS = (*(f"Word{i}" for i in range(20)), *(f"word{i}" for i in range(32)))
VOCABULARY = (*SPECIAL_TOKENS, "the", ".", ",", *DIGITS, *WORDS)
HOOK = "blocks.0.hook_resid_pre"


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(scope="session")
def word_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("word_tokenizer")
    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="session")
def word_model(word_tokenizer: PreTrainedTokenizerFast) -> HookedSAETransformer:
    """A transformer whose first hidden state says which word it is: a 1 in the token's own dimension."""
    width = len(VOCABULARY)
    cfg = HookedTransformerConfig(
        n_layers=2,
        d_model=width,
        n_ctx=32,
        d_head=8,
        n_heads=2,
        d_mlp=8,
        d_vocab=width,
        act_fn="gelu",
        seed=0,
        device="cpu",
    )
    model = HookedSAETransformer(cfg, tokenizer=word_tokenizer)
    model.W_E.data.copy_(torch.eye(width))
    model.W_pos.data.zero_()
    return model


FEATURES: dict[str, Callable[[str], bool]] = {
    "digits": lambda token: token in DIGITS,
    "the": lambda token: token == "the",
    "sentence end": lambda token: token == ".",
    "nothing": lambda token: token.lower().endswith(("1", "3", "7")),
}


def _encoder() -> torch.Tensor:
    """(d_in, 4): 1 where the token belongs to the feature."""
    return torch.tensor(
        [[float(rule(token) and token not in SPECIAL_TOKENS) for rule in FEATURES.values()] for token in VOCABULARY]
    )


@pytest.fixture(scope="session")
def make_sae() -> Callable[[], StandardSAE]:
    """Makes an SAE of features known by construction: digits, "the", sentence ends, words with nothing in common."""

    def make() -> StandardSAE:
        sae = StandardSAE(StandardSAEConfig(d_in=len(VOCABULARY), d_sae=len(FEATURES)))
        zeros = {"b_enc": torch.zeros(len(FEATURES)), "b_dec": torch.zeros(len(VOCABULARY))}
        sae.load_state_dict({**sae.state_dict(), "W_enc": _encoder(), **zeros})
        sae.cfg.metadata.hook_name = HOOK
        return sae

    return make


@pytest.fixture(scope="session")
def make_bae() -> Callable[[], BAE]:
    """The same features as bits."""

    def make() -> BAE:
        bae = BAE(BAEConfig(d_in=len(VOCABULARY), d_sae=len(FEATURES)))
        bias = torch.full((len(FEATURES),), -0.5)
        bae.load_state_dict({**bae.state_dict(), "W_enc": _encoder(), "b_enc": bias})
        bae.cfg.metadata.hook_name = HOOK
        return bae

    return make


@pytest.fixture
def known_sae(make_sae: Callable[[], StandardSAE]) -> StandardSAE:
    return make_sae()


@pytest.fixture
def known_bae(make_bae: Callable[[], BAE]) -> BAE:
    return make_bae()


@pytest.fixture(scope="session")
def word_texts() -> list[str]:
    """400 texts of four sentences, different ones."""
    generator = torch.Generator().manual_seed(0)

    def sentence() -> str:
        capital, *words = torch.randint(0, 20, (9,), generator=generator).tolist()
        middle = [f"word{word}" for word in words]
        if capital % 2:
            middle[2] = "the"
        if capital % 3 == 0:
            middle[5] = DIGITS[capital % 5]
        return f"Word{capital} {' '.join(middle)}."

    return [" ".join(sentence() for _ in range(4)) for _ in range(400)]


class RuleJudge:
    """Describes and judges by rules, so that the right scores are known."""

    name = "rules"
    needs_background = False

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()

    def prepare(self, background: list[Instance]) -> None:
        assert background

    async def explain(self, examples: list[Instance], marked: bool) -> str | None:  # noqa: ARG002
        self.asked["explain"] += 1
        for name, rule in FEATURES.items():
            if name != "nothing" and all(rule(example.text) for example in examples):
                return name
        return "word"

    async def judge(self, explanation: str, instances: list[Instance], question: Question) -> list[Verdict]:
        self.asked[question] += 1
        return [self._verdict(explanation, instance, question) for instance in instances]

    def _verdict(self, explanation: str, instance: Instance, question: Question) -> Verdict:
        rule = FEATURES.get(explanation, lambda token: token == "word")
        if question == "passage":
            yes = any(rule(token) for token in instance.sentence.replace(".", " . ").split())
        elif question == "highlights":
            yes = all(rule(instance.sentence[start:end]) for start, end in instance.highlights)
        else:
            yes = rule(instance.text)
        return Verdict(yes, 0.9 if yes else 0.1)

    async def simulate(self, explanation: str, excerpts: list[Excerpt]) -> list[Prediction]:
        self.asked["simulate"] += 1
        rule = FEATURES.get(explanation, lambda token: token == "word")
        return [Prediction([10.0 * rule(token) for token in excerpt.token_texts]) for excerpt in excerpts]

    async def find_intruder(self, instances: list[Instance]) -> Choice:
        self.asked["intruder"] += 1
        for rule in FEATURES.values():
            unlike = [number for number, instance in enumerate(instances) if not rule(instance.text)]
            if len(unlike) == 1:
                return Choice(unlike[0])
        return Choice(None)

    async def close(self) -> None:
        pass


@pytest.fixture
def rule_judge() -> RuleJudge:
    return RuleJudge()


@pytest.fixture
def report(
    rule_judge: RuleJudge, word_model: HookedSAETransformer, known_sae: StandardSAE, word_texts: list[str]
) -> ComSemReport:
    comsem = ComSem(rule_judge, corpus=CorpusSettings(tokens=2000, context_size=16), accept_failing_judge=True)
    return comsem.score(word_model, {"known": known_sae}, word_texts)


class ChatServer:
    """A server that speaks the OpenAI protocol on loopback and fails as it is told to."""

    def __init__(self) -> None:
        self.received = 0
        self.keys: set[str | None] = set()
        self.answered: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.fault: Callable[[int], str | None] = lambda _: None
        self.answer: Callable[[dict[str, Any]], Any] = lambda _: "Yes"
        self.usage: dict[str, int] | None = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
        self.raw: Callable[[dict[str, Any]], bytes] | None = None  # in the place of a completion
        self.seconds_a_byte = 0.0
        self.complaint = "told to fail"
        self.headers: dict[str, str] = {}
        self.latency = 0.0
        self.retry_after = "0.02"
        self._lock, self._released = threading.Lock(), threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                owner.handle(self)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        with self._lock:
            number = self.received
            self.received += 1
            self.keys.add(request.headers["Authorization"])
            self.bodies.append(body)
        fault = self.fault(number)
        time.sleep(self.latency + (0.3 if fault == "slow" else 0))
        if fault == "drop":
            request.close_connection = True
            request.connection.close()
            return
        if fault == "hang":
            self._released.wait()
            request.close_connection = True
            return
        if fault == "cut":
            request.send_response(200)
            request.send_header("Content-Type", "application/json")
            request.send_header("Content-Length", "1000")
            request.end_headers()
            request.wfile.write(b'{"choices": [')
            request.wfile.flush()
            request.close_connection = True
            request.connection.close()
            return
        status = int(fault) if fault is not None and fault.isdigit() else 200
        content = json.dumps({"error": {"message": f"{self.complaint}, {request.headers['Authorization']}"}})
        if status == 200:
            content = json.dumps(self._completion(body, fault))
        if fault == "malformed":
            content = content[: len(content) // 2]
        if status == 200 and fault in (None, "slow", "truncated"):
            with self._lock:
                self.answered[json.dumps(body, sort_keys=True)] += 1
        data = self.raw(body) if self.raw and status == 200 else content.encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        if status == 429:
            request.send_header("Retry-After", self.retry_after)
        for name, value in self.headers.items():
            request.send_header(name, value)
        request.end_headers()
        if not self.seconds_a_byte:
            request.wfile.write(data)
            return
        try:
            for number in range(len(data)):
                request.wfile.write(data[number : number + 1])
                request.wfile.flush()
                time.sleep(self.seconds_a_byte)
        except OSError:  # the client has gone
            request.close_connection = True

    def _completion(self, body: dict[str, Any], fault: str | None) -> dict[str, Any]:
        text = {"blank": " ", "no content": None}.get(fault or "", self.answer(body))
        if fault == "truncated":
            text = text[: len(text) // 2]
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": "length" if fault == "truncated" else "stop",
        }
        return {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [] if fault == "empty" else [choice],
            "usage": self.usage,
        }

    def close(self) -> None:
        self._released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def chat_server() -> Iterator[ChatServer]:
    server = ChatServer()
    yield server
    server.close()


@pytest.fixture
def cache_file(tmp_path: Path) -> Path:
    return tmp_path / "answers.sqlite"
