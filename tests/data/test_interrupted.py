"""`hybridtrain prepare` interrupted by kills, a full disk, changed text: in the end the same bytes."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybridtrain.config.schema import PrepareConfig
from hybridtrain.data.corpus import Corpus
from hybridtrain.data.prepare import pieces, sources, tokenize
from hybridtrain.data.prepare.prepared import settings_of
from hybridtrain.data.prepare.units import Fields
from hybridtrain.errors import UserError
from tests.data.texts import contents, settings, write_texts

PROGRAM = """
import sys
from hybridtrain.config.schema import DataConfig, PrepareConfig
from hybridtrain.data.prepare import pieces, tokenize
pieces.MIN_PIECE_BYTES = 20_000
pieces.MAX_PIECES = 10**6
data = DataConfig(path=sys.argv[1], source=[sys.argv[2]], vocab_size=600, eval_fraction=0.1)
tokenize.prepare(data, options=PrepareConfig())
"""


def start_prepare(folder: Path, source: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), str(source)], stderr=subprocess.PIPE, text=True
    )


def kill_until_done(folder: Path, source: Path, *, kills: int, seed: int) -> str:
    """Kill `prepare` at `kills` random moments of its work, then let it finish; its last stderr."""
    generator = random.Random(seed)
    for _ in range(kills):
        process = start_prepare(folder, source)
        have = len(list(folder.glob(".partial/piece-*")))
        while (
            process.poll() is None
            and len(list(folder.glob(".partial/piece-*"))) == have
            and not (have == 0 and generator.random() < 0.002)
        ):
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    last = start_prepare(folder, source)
    _, said = last.communicate()
    assert last.returncode == 0, said
    return said


def check_kills(tmp_path: Path, *, kills: int, seed: int) -> None:
    source = write_texts(tmp_path / "texts", documents=400, words=2000)
    reference = start_prepare(tmp_path / "reference", source)
    assert "continuing" not in reference.communicate()[1]
    assert reference.returncode == 0
    said = kill_until_done(tmp_path / "killed", source, kills=kills, seed=seed)
    assert "continuing an interrupted prepare" in said or "prepared already" in said
    assert contents(tmp_path / "killed") == contents(tmp_path / "reference")


@pytest.mark.slow
def test_kills_change_no_byte(tmp_path):
    check_kills(tmp_path, kills=4, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_many_kills_change_no_byte(tmp_path, seed):
    check_kills(tmp_path, kills=15, seed=seed)


@pytest.mark.parametrize("room", [1_000, 100_000])
def test_a_full_disk_is_said_and_survived(tmp_path, room):
    """RLIMIT_FSIZE makes writes fail as a full disk does, of the tokenizer or of tokens; with room the
    same command goes on."""
    data = settings(
        tmp_path / "data", write_texts(tmp_path / "texts", documents=20, words=3000), vocab_size=300
    )
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, old[1]))
        with pytest.raises(UserError, match=r"data\.path=.*the file would be larger than is allowed"):
            tokenize.prepare(data, options=PrepareConfig())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    with pytest.raises(UserError, match="an interrupted prepare, or one still at work"):
        Corpus.open(tmp_path / "data")
    assert Corpus.open(tokenize.prepare(data, options=PrepareConfig())).vocab_size == 300


def test_changed_text_is_not_mixed_with_old_pieces(tmp_path):
    source = write_texts(tmp_path / "texts", documents=6, words=300)
    data = settings(tmp_path / "data", source, vocab_size=300)
    partial = tmp_path / "data" / ".partial"
    partial.mkdir(parents=True)

    def begin() -> None:
        tokenize._open_partial(
            partial,
            settings=settings_of(data),
            planned=pieces.plan(sources.listing(data).sources, fields=Fields.of(data)),
        )

    begin()
    (partial / "piece-00000").mkdir()
    begin()
    assert (partial / "piece-00000").is_dir()
    changed = source / "part0" / "0.txt"
    os.utime(changed, ns=(1, 1))
    begin()
    assert [path.name for path in partial.iterdir()] == ["plan.json"]
