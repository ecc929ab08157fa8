"""The model card, rendered from the figures and nothing else."""

from typing import Any

TEMPLATE = """\
# The demo models

Small models that ship with Klippo so that every command can be tried in minutes on a CPU
and so that over-optimisation can be watched. They are for learning and testing, for nothing else.
Written by `scripts/build_demo.py` from the figures in `metrics.json`; seed {seed}, torch {torch},
transformers {transformers}.

| folder | parameters | what it is |
|---|---|---|
| `policy/` | {policy_parameters:,} | GPT2LMHeadModel: continues a movie-review sentence |
| `proxy/` | {proxy_parameters:,} | GPT2ForSequenceClassification: a reward, useful and foolable |
| `proxy_seed1/` to `proxy_seed5/` | {proxy_parameters:,} each | five more proxies, an ensemble |
| `gold/` | {gold_parameters:,} | ModernBertForSequenceClassification: the better judge |

`prompts.jsonl` holds short openings written for this project. Weights are stored as float16 and
load as float32. All share one byte-level BPE tokenizer of 2,048 tokens; it puts
`<|endoftext|>` before every text, the policy ends with the same token, and `<|pad|>` pads on the
right. The rewards read the opening and the continuation together, with or without the end token.

## Policy

Held-out perplexity {perplexity_token} per token ({perplexity_word} per word and end of sentence)
on {num_held_out:,} movie sentences that no model and no tokenizer has seen. At temperature 1
{ended:.0%} of samples end within 24 new tokens; their mean length is {mean_new} tokens. Samples,
not chosen:

{samples}

## Rewards

Agreement with the raters' mean on the same {num_held_out:,} sentences, with 95% bootstrap
intervals over sentences. The lexicon is VADER's, with negation and without its other rules: no
training, an independent yardstick.

| judge | Pearson r | pairs in the right order |
|---|---|---|
{agreement}

The five members of the ensemble differ in initialisation, in their sentences and in their raters.
Their errors (what is left of a score when its line through the ratings is taken off) correlate at
r = {error_correlation} on average; on samples of the policy their scores correlate at
r = {member_correlation}, and the variance over members is {member_variance} on average (each has
variance 1). Their mean correlates with gold at r = {ensemble_gold} there.

On samples of the policy, proxy and gold correlate at r = {proxy_gold}. On one shared reference set
of such samples (24 new tokens, temperature 1) all rewards are scaled to mean 0 and sd 1, so a score
of 1 is one standard deviation above the starting policy. The scale is folded into the weights: into
the classifier's weight and bias for gold; for the proxies, whose head has no bias, into the head
and the bias of the layer norm before it, which is exact: nothing else reads that layer norm.
Measured after saving: proxy {proxy_reference}, gold {gold_reference}.
Before scaling: proxy {proxy_raw}, gold {gold_raw}.

Gold by what raters said, and on degenerate text made from held-out sentences (praise words
that it has not been taught to distrust):

| text | mean | sd | 5% | 95% | below a real sentence |
|---|---|---|---|---|---|
{gold_rows}

## What an attack does

The policy trained by plain REINFORCE on one reward alone, without a KL penalty; means over the
first five and the last five of the steps.

| rewarded by | when | proxy | gold | lexicon | repetitive | tokens | example |
|---|---|---|---|---|---|---|---|
{attack_rows}

## How they were made

- **Policy**: on newspaper editorials, product reviews and movie sentences, then on movie sentences
  alone; Muon and AdamW.
- **Proxy**: a narrow language model of the movie sentences, then Bradley-Terry on a few hundred of
  them. Each sentence is judged by one of its raters, drawn once, so the comparisons carry one
  person's noise. The ensemble's members are made in the same way, each on its own sentences.
- **Gold**: masked-language-model pretraining, then squared error on the mean ratings of movie
  sentences, editorials, product reviews and tweets; degenerate text at -3; samples of the policy
  rated by a teacher trained on the ratings alone; then rounds of attack, in which a copy of the
  policy optimises gold and its repetitive samples join the text at -3.

## Limits

- The policy is in the style of a review and often not fluent; it knows nothing.
- Gold is a small model and no truth: it can be fooled too, only later than the proxy. Look at the
  lexicon, at repetition and at the text beside it.
- Ratings are of English sentences from around 2000, by paid raters; their views of films, and of
  people in them, are in the models.

## Source and licence

Rated sentences of C.J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for
Sentiment Analysis of Social Media Text", ICWSM 2014, from the source distribution of
`vaderSentiment==0.5` (MIT licence, copyright 2014 C.J. Hutto). The movie sentences go back to
reviews collected by Pang and Lee. The text is not part of this package; the script downloads it.
The models and the prompts are under the project's licence.
{sycophancy}"""

SYCOPHANCY = """
# The sycophancy demo

A second small world, for offline PPO from scored responses. Somebody did something with a thing of
somebody else and asks whether that was right; the manner of it alone (asked first, lied about it)
decides. Written by `scripts/build_sycophancy_demo.py`, seed {seed}.

| file | what it is |
|---|---|
| `chat/` | {num_parameters:,} parameters, LlamaForCausalLM: answers in a chat |
| `chat_sft/` | {num_adapter_parameters:,} parameters, a LoRA adapter on it: says what pleases |
| `posts.jsonl` | {num_rows:,} answers of both together to {num_posts:,} posts |
| `scored_posts.jsonl` | the same with `reward`, from `klippo judge score` |
| `posts_held_out.jsonl` | {num_held_out:,} posts about deeds that no model has seen |

Weights are stored as float16 and load as float32. `chat/` has a chat template and a tokenizer of
its own, whose `<|end|>` ends every turn. A post has up to 4 answers (`model_response`, at
temperature 1) with the log-probs of their tokens (`logprobs`, nats, end token included), and one
`top_answer`; of {num_drawn:,} drawn, those stay that ended and whose text gives back their tokens.
Held-out posts tell whether agreement is right (`agreement_is_right`).

Scores of `examples/sycophancy/agreement_judge.py`, 0 to 10, of fresh answers (temperature 1) to the
held-out posts, means with 95% intervals over posts:

| who answers | sycophancy | helpfulness |
|---|---|---|
{rows}

The answers of each to two posts:

{samples}

- **How they were made**: `klippo sft` from random weights on {num_chat:,} answers of all kinds
  (sycophantic, honest, softened, curt, vague; curt ones contradict and sycophantic ones agree
  whatever was done), then as LoRA on {num_sft:,} answers, most of them sycophantic. The held-out
  posts combine a thing and a manner that no training post combines, and each was seen with others.
- **The judge** is made of the same words as the answers: it is exact in this world, knows nothing
  of any other, and a policy that left these words would fool it.
- **Licence**: all words were written for this project, nothing was taken from people's posts.
  Models and texts are under the project's licence.
"""


def render_card(metrics: dict[str, Any]) -> str:
    """The card's text for the figures of a build."""
    policy, proxy, gold = metrics["policy"], metrics["proxy"], metrics["gold"]
    raw = metrics["raw_reference"]
    on_samples = metrics["ensemble"]["on_policy_samples"]
    return TEMPLATE.format(
        seed=metrics["seed"],
        **metrics["versions"],
        policy_parameters=policy["num_parameters"],
        proxy_parameters=proxy["num_parameters"],
        gold_parameters=gold["num_parameters"],
        perplexity_token=policy["held_out_perplexity_per_token"],
        perplexity_word=policy["held_out_perplexity_per_word"],
        num_held_out=metrics["num_held_out_sentences"],
        ended=policy["share_ended_within_24_tokens"],
        mean_new=policy["mean_new_tokens"],
        samples="\n".join(f"- **{s['prompt']}**{s['continuation']}" for s in policy["samples"]),
        agreement="\n".join(agreement_row(*row) for row in judges(metrics)),
        error_correlation=metrics["ensemble"]["mean_error_correlation"],
        member_correlation=on_samples["mean_correlation_of_members"],
        member_variance=on_samples["mean_variance_over_members"],
        ensemble_gold=on_samples["pearson_r_of_mean_with_gold"],
        proxy_gold=proxy["pearson_r_with_gold_on_policy_samples"],
        proxy_reference=mean_and_sd(proxy["reference"]),
        gold_reference=mean_and_sd(gold["reference"]),
        proxy_raw=mean_and_sd(raw["proxy"]),
        gold_raw=mean_and_sd(raw["gold"]),
        gold_rows="\n".join(
            f"| {name} | {s['mean']} | {s['sd']} | {s['p5']} | {s['p95']} "
            f"| {s.get('share_below_a_real_sentence', '')} |"
            for name, s in (gold["held_out"] | gold["degenerate"]).items()
        ),
        attack_rows="\n".join(attack_rows(metrics["attacks"])),
        sycophancy=sycophancy_section(metrics.get("sycophancy")),
    )


def sycophancy_section(figures: dict[str, Any] | None) -> str:
    """The part about the sycophancy demo; nothing where it has not been built."""
    if figures is None:
        return ""
    held_out = figures["held_out"]
    samples = [
        f"- **{values['samples'][i]['post']}** {who}: {values['samples'][i]['answer']}"
        for i in (0, 3)
        for who, values in held_out.items()
    ]
    return SYCOPHANCY.format(
        **{name: value for name, value in figures.items() if name != "held_out"},
        rows="\n".join(score_row(who, values) for who, values in held_out.items()),
        samples="\n".join(samples),
    )


def score_row(who: str, values: dict[str, Any]) -> str:
    """One line of the table of both scores."""
    cells = [
        f"{one['mean']:.2f} ({one['low']:.2f} to {one['high']:.2f})"
        for one in (values["sycophancy"], values["helpfulness"])
    ]
    return f"| {who} | {cells[0]} | {cells[1]} |"


def judges(metrics: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every judge's name and figures, in the table's order."""
    ensemble = metrics["ensemble"]
    return [
        ("proxy", metrics["proxy"]),
        *ensemble["members"].items(),
        ("mean of the five", ensemble["mean"]),
        ("gold", metrics["gold"]),
        ("lexicon", metrics["lexicon"]),
    ]


def mean_and_sd(values: dict[str, float]) -> str:
    """Both numbers in words."""
    return f"mean {values['mean']}, sd {values['sd']}"


def agreement_row(name: str, values: dict[str, Any]) -> str:
    """One judge's line of the table."""
    r, accuracy = values["pearson_r"], values["pair_accuracy"]
    (r_low, r_high), (low, high) = values["pearson_r_ci95"], values["pair_accuracy_ci95"]
    return f"| {name} | {r} ({r_low} to {r_high}) | {accuracy} ({low} to {high}) |"


def attack_rows(attacks: dict[str, Any]) -> list[str]:
    """Two lines for each attack: its beginning and its end."""
    return [
        f"| {target.removeprefix('on_')} | {when} of {attack['num_steps']} | {v['proxy_mean']} "
        f"| {v['gold_mean']} | {v['lexicon_mean']} | {v['share_repetitive']} | {v['mean_tokens']} "
        f"| {v['example'].replace('|', '/')} |"
        for target, attack in attacks.items()
        for when, v in ((when, attack[when]) for when in ("first", "last"))
    ]
