"""The source texts: download, parse, clean, split, and the tokenizer trained on them."""

import ast
import math
import random
import re
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SOURCE = "vaderSentiment==0.5"
ARCHIVE_MEMBER = "additional_resources/hutto_ICWSM_2014.tar.gz"
ARCHIVE_FOLDER = "hutto_ICWSM_2014"
VOCAB_SIZE = 2048
EOS, PAD = "<|endoftext|>", "<|pad|>"
EOS_ID, PAD_ID = 0, 1
NEGATIONS = {"not", "no", "never", "neither", "nor", "without", "hardly", "cannot", "nothing"}
NUM_TEST = 1000
MAX_TOKENS = 80  # longest training sequence, bos and eos included


@dataclass(frozen=True, kw_only=True, slots=True)
class Sentence:
    """One rated sentence of the source."""

    text: str
    mean_rating: float  # -4 (extremely negative) to 4 (extremely positive)
    ratings: tuple[int, ...]  # the single raters behind the mean


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Movie sentences, split; the other rated texts of the source; the lexicon."""

    train: list[Sentence]
    test: list[Sentence]  # 1,000 movie sentences that no model and no tokenizer has seen
    editorials: list[Sentence]
    products: list[Sentence]
    tweets: list[Sentence]
    lexicon: dict[str, float]


def download(folder: Path) -> Path:
    """Fetch the source distribution into `folder` and return the unpacked archive's folder."""
    unpacked = folder / ARCHIVE_FOLDER
    if unpacked.exists():
        return unpacked
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*command, "--no-binary", ":all:", "--dest", str(folder), SOURCE], check=True)
    with zipfile.ZipFile(next(folder.glob("vaderSentiment-0.5*.zip"))) as sdist:
        member = next(name for name in sdist.namelist() if name.endswith(ARCHIVE_MEMBER))
        tar_path = Path(sdist.extract(member, folder))
    with tarfile.open(tar_path) as archive:
        archive.extractall(folder, filter="data")
    return unpacked


def clean(text: str) -> str:
    """Undo the source's '' for a double quote, straighten quotes, normalise Unicode and spaces."""
    text = unicodedata.normalize("NFKC", text).replace("''", '"')
    text = text.translate(str.maketrans("\u2018\u2019\u201c\u201d", "''\"\""))
    return re.sub(r"\s+", " ", text).strip()


def parse(folder: Path, name: str) -> list[Sentence]:
    """Join `name`'s texts with their single ratings, by id."""

    def rows(suffix: str, num_columns: int) -> dict[str, list[str]]:
        path = folder / f"{name}_{suffix}.txt"
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        cells = (line.rstrip("\r").split("\t", num_columns - 1) for line in lines)
        return {row[0]: row[1:] for row in cells if len(row) == num_columns}

    texts, ratings = rows("GroundTruth", 3), rows("anonDataRatings", 4)
    return [
        Sentence(
            text=clean(text),
            mean_rating=float(mean),
            ratings=tuple(ast.literal_eval(ratings[key][2])),
        )
        for key, (mean, text) in texts.items()
        if key in ratings
    ]


def load_corpus(folder: Path, seed: int, limit: int | None = None) -> Corpus:
    """Parse all; hold out NUM_TEST movie sentences and drop repeats of them from training."""
    movies = parse(folder, "movieReviewSnippets")
    random.Random(seed).shuffle(movies)
    test = movies[:NUM_TEST]
    held_out = {sentence.text.lower() for sentence in test}
    lines = (folder / "vader_sentiment_lexicon.txt").read_text(errors="replace").splitlines()
    entries = (line.split("\t") for line in lines)
    return Corpus(
        train=[s for s in movies[NUM_TEST:] if s.text.lower() not in held_out][:limit],
        test=test,
        editorials=parse(folder, "nytEditorialSnippets")[:limit],
        products=parse(folder, "amazonReviewSnippets")[:limit],
        tweets=parse(folder, "tweets")[:limit],
        lexicon={entry[0]: float(entry[1]) for entry in entries if len(entry) > 1},
    )


def lexicon_score(text: str, lexicon: dict[str, float]) -> float:
    """VADER's lexicon without its other rules: summed valences, negated ones times -0.74, squashed.

    x / sqrt(x^2 + 15), the normalisation of Hutto & Gilbert (2014); no training, no word order
    beyond a negation among the three words before.
    """
    words = [word.strip(".,;:!?\"'()-") for word in text.lower().split()]
    total = 0.0
    for i, word in enumerate(words):
        negated = any(w in NEGATIONS or w.endswith("n't") for w in words[max(0, i - 3) : i])
        total += lexicon.get(word, 0.0) * (-0.74 if negated else 1.0)
    return total / math.sqrt(total * total + 15)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts bos before every text; bos and eos are one token, pad is another."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{EOS} $A", pair=f"{EOS} $A $B", special_tokens=[(EOS, EOS_ID)]
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str], eos: bool) -> list[list[int]]:
    """bos + text, at most MAX_TOKENS long, with eos after it when asked."""
    # Cut here: asking the tokenizer to truncate would write the limit into the saved tokenizer.
    bodies = tokenizer(texts, verbose=False)["input_ids"]
    return [ids[: MAX_TOKENS - 1] + ([EOS_ID] if eos else []) for ids in bodies]
