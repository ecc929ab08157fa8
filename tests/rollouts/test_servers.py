"""Sampling on rollout servers: real ones on loopback, around the Hugging Face engine."""

import json
import signal
import time
from contextlib import ExitStack
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler

import httpx2
import pytest
import torch

from klippo.config.schema import RunConfig
from klippo.errors import ConfigError, PreflightError, ServerError
from klippo.policy.merged import merged_weights
from klippo.ranks import Ranks
from klippo.rollouts import remote as remote_side
from klippo.rollouts import servers
from klippo.rollouts.hf import HFEngine
from klippo.rollouts.opening import Opening, pack, unpack
from klippo.rollouts.protocol import DIGEST, PROTOCOL, RUN, TOKEN_VARIABLE, VERSION, Asked
from klippo.rollouts.remote import Timing, greet
from klippo.rollouts.sampling import Sampling
from klippo.rollouts.seeds import response_seeds
from klippo.rollouts.servers import ServersEngine
from klippo.rollouts.settings import RolloutSettings, VLLMSettings
from klippo.train.engines import build_engine, check_engine_settings, own_servers
from klippo.train.serve_rollouts import serve
from tests.rollouts.serving import (
    QUICK,
    CopyEngine,
    DiceEngine,
    later,
    server_here,
    server_process,
)
from tests.toys import CPU, EOS, RAGGED, disturb, load, prompt

PROMPTS = [prompt(*ids, id=i) for i, (ids, _) in enumerate(RAGGED * 2)]
LIMITS = [9, 12, 5, 1, 7, 3, 12, 8]
SEEDS = response_seeds(0, range(8))
ASKED = (PROMPTS, LIMITS, SEEDS)


@pytest.fixture
def policy():
    return load(tuning="lora").policy


def opening_of(policy, temperature=0.7):
    return Opening.of(
        policy.lm.model, VLLMSettings(), dtype=torch.float32, stop_ids=frozenset({EOS}),
        temperature=temperature, max_tokens=20, batch_size=None, seed=0,
    )  # fmt: skip


def remote(policy, *urls, patience_s=60.0, say=lambda text: None, temperature=0.7, timing=QUICK):
    return ServersEngine(
        urls, partial(merged_weights, policy), opening_of(policy, temperature), say=say,
        patience_s=patience_s, timing=timing,
    )  # fmt: skip


def local(policy):
    """What the policy itself samples."""
    return HFEngine(
        policy.lm.model, stop_ids=frozenset({EOS}), sampling=Sampling(temperature=0.7),
        batch_size=1, record_logprobs=True,
    ).generate(*ASKED)  # fmt: skip


def run_config(**rollout):
    return RunConfig(
        policy={"model": "toy"}, data={"train": "toy"}, rollout=rollout,
        reward={"kind": "length", "max_tokens": 9},
    )  # fmt: skip


def dice(policy):
    """What the servers in processes of their own answer."""
    engine = DiceEngine(opening_of(policy), partial(merged_weights, policy))
    engine.pause_s = 0.0
    return engine.generate(*ASKED)


def assert_same(ours, theirs):
    """Equal tokens; a merged adapter rounds log-probs otherwise than one beside its base."""
    assert [(c.token_ids, c.finished) for c in ours] == [(c.token_ids, c.finished) for c in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@pytest.mark.parametrize("number", [1, 3])
def test_responses_are_the_policys_before_and_after_a_step(policy, number):  # rules 7 and 8
    with ExitStack() as stack:
        here = [stack.enter_context(server_here()) for _ in range(number)]
        sampler = remote(policy, *(server.url for server, _ in here))
        told = {}
        first = sampler.generate(*ASKED, told.setdefault)
        assert_same(first, local(policy))
        assert told == dict(enumerate(first))

        disturb(policy.trainable()[0], 0.3)
        assert sampler.generate(*ASKED) == first, "a copy, until it is renewed"
        sampler.sync()
        second = sampler.generate(*ASKED)
        assert_same(second, local(policy))
        assert second != first
        for _, said in here:  # each has its share, and weights come once for each step
            assert sum("Weights" in text for text in said) == 2


def test_equal_weights_are_not_sent_again(policy):
    with server_here() as (server, said):
        sampler = remote(policy, server.url)
        for _ in range(3):
            sampler.sync()
            sampler.generate(*ASKED)
        assert sum("Weights" in text for text in said) == 1


def test_packed_weights_are_the_weights_and_their_digest_tells_them_apart():
    weights = {
        "matrix": torch.randn(3, 4),
        "bias": torch.randn(4),
        "turned": torch.randn(5, 2).T,
        "count": torch.tensor(3),
    }
    packed = pack(weights.items(), torch.float32)
    found = dict(unpack(b"".join(packed.parts)))
    assert list(found) == list(weights)
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert packed.num_bytes == len(b"".join(packed.parts))
    assert pack(weights.items(), torch.float32).digest == packed.digest
    assert pack((weights | {"count": torch.tensor(4)}).items(), torch.float32).digest != (
        packed.digest
    )
    half = dict(unpack(b"".join(pack(weights.items(), torch.bfloat16).parts)))
    assert torch.equal(half["matrix"], weights["matrix"].bfloat16())
    assert torch.equal(half["bias"], weights["bias"])


def test_a_killed_server_that_is_back_goes_on_where_it_was(policy):
    with server_process() as process:
        told, said, restarting = [], [], []

        def kill(i, completion):
            told.append(i)
            if len(told) == 3:
                process.kill()
                restarting.append(later(process.start))

        sampler = remote(policy, process.url, say=said.append)
        found = sampler.generate(*ASKED, kill)
        restarting[0].join()
        assert found == dice(policy), "same seeds, same responses, and the weights sent again"
        assert sorted(told) == list(range(8)), "each is told once, also those of before"
        lost, back = said
        assert f"{process.url} is lost" in lost
        assert lost.endswith("asking again")
        assert back == f"the rollout server {process.url} is back"


def test_the_others_stand_in_for_a_server_that_died(policy):
    with server_process() as process, server_here(DiceEngine) as (other, _):
        told, said = [], []

        def kill(i, completion):
            told.append(i)
            if len(told) == 2:
                process.kill()

        sampler = remote(policy, process.url, other.url, say=said.append)
        assert sampler.generate(*ASKED, kill) == dice(policy)
        assert sorted(told) == list(range(8))
        disturb(policy.trainable()[0], 0.3)
        sampler.sync()
        assert sampler.generate(*ASKED) == dice(policy)
        (lost,) = said
        assert f"{process.url} is lost" in lost
        assert lost.endswith("asking the others")


def test_a_server_that_hangs_is_given_up(policy):
    timing = Timing(silence_s=0.5)
    with server_process() as process, server_here(DiceEngine) as (other, _):
        remote(policy, process.url).generate(*ASKED)
        process.signal(signal.SIGSTOP)
        start = time.monotonic()
        sampler = remote(policy, process.url, other.url, timing=timing)
        assert sampler.generate(*ASKED) == dice(policy)
        assert time.monotonic() - start > timing.silence_s


def test_when_no_server_is_left_the_run_ends_with_their_names_and_what_to_do(policy):
    with server_process() as process:
        sampler = remote(policy, process.url, patience_s=0.5)
        sampler.generate(*ASKED)
        process.kill()
        with pytest.raises(ServerError) as ending:
            sampler.generate(*ASKED)
        text = str(ending.value)
        assert process.url in text
        assert "refused" in text
        assert "in 0.5 s (rollout.vllm.patience_s)" in text
        assert "klippo serve-rollouts" in text
        assert ending.value.exit_code == 3


def test_an_engine_that_broke_is_made_anew(policy):
    class Brittle(CopyEngine):
        made = 0

        def __init__(self, *given):
            super().__init__(*given)
            Brittle.made += 1
            self.is_first = Brittle.made == 1

        def generate(self, prompts, max_lengths, seeds, on_done=None):
            if self.is_first:
                super().generate(prompts[:2], max_lengths[:2], seeds[:2], on_done)
                raise RuntimeError("CUDA error")
            return super().generate(prompts, max_lengths, seeds, on_done)

    with server_here(Brittle) as (server, said):
        news = []
        assert_same(remote(policy, server.url, say=news.append).generate(*ASKED), local(policy))
        assert Brittle.made == 2
        assert "RuntimeError: CUDA error" in news[0]
        assert any("Traceback" in text for text in said)


@pytest.mark.parametrize("kind", [PreflightError, ConfigError])
def test_what_no_further_attempt_mends_ends_the_run_at_once(policy, kind):
    def refuse(opening, weights):
        raise kind("vLLM cannot run this")

    with server_here(refuse) as (server, said):
        with pytest.raises(kind, match=f"{server.url}: vLLM cannot run this"):
            remote(policy, server.url).generate(*ASKED)
        assert sum("vLLM cannot" in text for text in said) == 1


def test_after_an_interruption_the_server_stops_and_answers_the_next(policy):
    class Slow(CopyEngine):
        def generate(self, prompts, max_lengths, seeds, on_done=None):
            def tell(i, completion):
                on_done(i, completion)
                time.sleep(0.2)

            return super().generate(prompts, max_lengths, seeds, tell)

    def interrupt(i, completion):
        raise KeyboardInterrupt

    with server_here(Slow) as (server, said):
        sampler = remote(policy, server.url)
        with pytest.raises(KeyboardInterrupt):
            sampler.generate(*ASKED, interrupt)
        assert_same(sampler.generate(*ASKED), local(policy))
        assert any("client has gone" in text for text in said)


def test_a_server_has_one_run_at_a_time_and_is_free_when_that_is_gone(policy, monkeypatch):
    with server_here() as (server, _):
        first = remote(policy, server.url)
        first.generate(*ASKED)
        monkeypatch.setattr(servers, "PROCESS", "another")
        with pytest.raises(PreflightError, match=rf"{server.url} cannot .* serves another run"):
            greet([server.url])
        second = remote(policy, server.url, patience_s=0.1)
        with pytest.raises(ServerError, match="serves another run until that one ends"):
            second.generate(*ASKED)
        del first  # its connection closes, as that of a process that ends
        assert_same(second.generate(*ASKED), local(policy))
        with pytest.raises(PreflightError, match="serves another run"):
            greet([server.url])


def test_two_engines_of_one_process_take_turns_each_with_its_own_temperature(policy):
    with server_here() as (server, _):
        warm, cold = remote(policy, server.url), remote(policy, server.url, temperature=0.01)
        expected = warm.generate(*ASKED)
        assert cold.generate(*ASKED) != expected
        assert warm.generate(*ASKED) == expected


def test_the_token_keeps_strangers_out(policy, monkeypatch):
    with server_here(token="s3cret-word") as (server, said):
        for wrong in (None, "s3cret-wore", "x" * 500):
            monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
            if wrong is not None:
                monkeypatch.setenv(TOKEN_VARIABLE, wrong)
            with pytest.raises(PreflightError, match=f"needs the token .* {TOKEN_VARIABLE}"):
                greet([server.url])
            with pytest.raises(ServerError, match="needs the token"):
                remote(policy, server.url, patience_s=0.1).generate(*ASKED)
        assert said == []
        monkeypatch.setenv(TOKEN_VARIABLE, "s3cret-word")
        greet([server.url])
        assert_same(remote(policy, server.url).generate(*ASKED), local(policy))


def test_requests_of_a_browser_are_refused():
    with server_here() as (server, said):
        for path in ("/open", "/weights", "/generate"):
            assert httpx2.post(server.url + path, content=b"{}").status_code == 409
        assert httpx2.get(server.url + "/health").status_code == 409
        assert said == []


def test_who_is_no_fit_server_is_named_before_the_run(monkeypatch):
    nowhere = "http://127.0.0.1:9"
    with pytest.raises(PreflightError, match=rf"{nowhere} cannot .*refused.*--port 9"):
        greet([nowhere])
    with server_here() as (one, _), server_here(engine="vLLM 0.33.0 on cuda") as (other, _):
        greet([one.url])
        with pytest.raises(PreflightError, match=rf"{other.url} has vLLM 0\.33\.0 on cuda"):
            greet([one.url, other.url])
        monkeypatch.setattr(remote_side, "PROTOCOL", "9")
        with pytest.raises(
            PreflightError, match="it speaks protocol 1, and who asks 9; install the same"
        ):
            greet([one.url])


def test_another_web_server_is_no_rollout_server():
    with HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as other:
        later(other.handle_request)
        url = f"http://127.0.0.1:{other.server_port}"
        with pytest.raises(PreflightError, match=r"is no rollout server \(status 404\)"):
            greet([url])


def test_damaged_weights_and_other_weights_are_refused(policy):
    headers = {VERSION: PROTOCOL, RUN: "process/run"}
    packed = pack(merged_weights(policy), torch.float32)
    body = b"".join(packed.parts)
    asked = Asked(weights="other", prompts=[[3]], max_lengths=[4], seeds=[5]).model_dump_json()
    with server_here() as (server, said), httpx2.Client(base_url=server.url) as client:
        client.headers.update(headers)
        early = client.post("/weights", content=body, headers={DIGEST: packed.digest})
        assert "started again" in early.text
        with client.stream("POST", "/open", content=opening_of(policy).model_dump_json()) as opened:
            assert json.loads(next(opened.iter_lines())) == {"end": {"weights": None}}
            damaged = body[:-1] + bytes([body[-1] ^ 1])
            refused = client.post("/weights", content=damaged, headers={DIGEST: packed.digest})
            assert refused.status_code == 400
            assert "damaged" in refused.text
            assert not any("Weights" in text for text in said)
            taken = client.post("/weights", content=body, headers={DIGEST: packed.digest})
            assert json.loads(taken.text) == {"end": {}}
            assert "other weights" in client.post("/generate", content=asked).text
            assert client.post("/generate", content="{}").status_code == 400
            assert client.post("/generate/x", content="{}").status_code == 400


@pytest.mark.parametrize(
    ("urls", "said"),
    [
        (["127.0.0.1:8321"], "no http address"),
        (["http://host"], "no http address"),
        (["http://host:x"], "no http address"),
        (["http://me:secret@host:1"], "more than host and port"),
        (["http://host:1/v1"], "more than host and port"),
        (["http://host:1", "http://host:1/"], "http://host:1 is there 2 times"),
    ],
)
def test_addresses_are_hosts_and_ports(urls, said):
    with pytest.raises(ValueError, match=said) as refusal:
        VLLMSettings(servers=urls)
    assert "secret" not in refusal.value.errors()[0]["msg"]


def test_each_process_has_servers_of_its_own():
    urls = [f"http://10.0.0.{k}:1" for k in range(5)]
    rollout = RolloutSettings(engine="vllm", vllm={"servers": urls})
    assert own_servers(rollout, Ranks(1, 2)) == (urls[1], urls[3])
    with pytest.raises(PreflightError, match=r"5 for the 6 processes .* start more, or fewer"):
        check_engine_settings(rollout, CPU, Ranks(0, 6))


def test_a_server_with_other_weights_is_found_before_the_run(policy):
    class Stale(CopyEngine):
        def sync(self):
            super().sync()
            disturb(self.model.parameters(), 0.1)

    with server_here() as (good, _), server_here(Stale) as (bad, _):
        config = run_config(engine="vllm", vllm={"servers": [good.url, bad.url]})
        with pytest.raises(PreflightError, match=rf"samples at {bad.url} from another distr"):
            build_engine(config, load(), frozenset({EOS}), PROMPTS, Ranks())


def test_servers_without_their_engine_are_refused():
    with pytest.raises(ValueError, match=r"rollout.engine=hf asks no server"):
        run_config(vllm={"servers": ["http://10.0.0.1:1"]})


def test_other_machines_are_let_in_with_a_token_alone(monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    for host in ("0.0.0.0", "192.0.2.1", "::"):
        with pytest.raises(PreflightError, match=f"--host {host} lets other machines in"):
            serve(DiceEngine, "test", host=host, port=0)
    with pytest.raises(ConfigError, match="--host example is no address"):
        serve(DiceEngine, "test", host="example", port=0)
    monkeypatch.setenv(TOKEN_VARIABLE, "two words")
    with pytest.raises(PreflightError, match="spaces or other characters"):
        serve(DiceEngine, "test", host="127.0.0.1", port=0)
    monkeypatch.setenv(TOKEN_VARIABLE, "word")
    with server_here() as (server, _):
        port = server.server_port
        with pytest.raises(PreflightError, match=f"--port {port}: the address cannot be used"):
            serve(DiceEngine, "test", host="127.0.0.1", port=port)


@pytest.mark.parametrize("name", ["evil.example", "evil.example:8321", "10.0.0.7", "", "[::1"])
def test_a_web_page_whose_name_leads_here_is_refused_without_a_token(name):
    """DNS rebinding: the page may send any header, but the browser says the page's name."""
    headers = {VERSION: PROTOCOL, RUN: "process/run", "Host": name}
    with server_here() as (server, said):
        for path in ("/open", "/weights", "/generate"):
            answer = httpx2.post(server.url + path, content=b"{}", headers=headers)
            assert answer.status_code == 421
        assert httpx2.get(server.url + "/health", headers=headers).status_code == 421
        for own in ("localhost", "127.0.0.1:8321", "[::1]:8321"):
            headers["Host"] = own
            assert httpx2.get(server.url + "/health", headers=headers).status_code == 200
        assert said == []
    headers |= {"Host": name or "x", "Authorization": "Bearer s3cret-word"}
    with server_here(token="s3cret-word") as (server, _):
        assert httpx2.get(server.url + "/health", headers=headers).status_code == 200
