import importlib
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import nn

from mmau.data.clips import ClipDataset
from mmau.data.feature_cache import (
    FeatureCache,
    FeatureCacheError,
    FeatureLayout,
    FeatureSource,
    module_fingerprint,
    prepared_sources,
    token_rows,
)
from mmau.data.prepared import PreparedTrial, save_trial
from mmau.data.store import CacheError, DiskFullError
from mmau.media.errors import MediaError
from mmau.modules import LandmarkToPatch

LAYOUT = FeatureLayout({"valid": ((), "bool"), "tokens": ((3, 2), "float16")})


def rows_of(source, chunk=4):
    """Values that tell trial and frame."""
    seed = sum(source.name.encode())
    for start in range(0, source.num_frames, chunk):
        frames = torch.arange(start, min(start + chunk, source.num_frames))
        tokens = (frames[:, None, None] + seed).expand(-1, 3, 2) * torch.tensor([1.0, 0.5])
        yield {"tokens": tokens, "valid": frames % 3 != 0}


def expected(source):
    parts = list(rows_of(source, 1000))
    if not parts:
        return {"tokens": np.zeros((0, 3, 2), np.float16), "valid": np.zeros(0, bool)}
    return {name: values.numpy() for name, values in parts[0].items()}


@pytest.fixture
def sources(tmp_path):
    lengths = {"a": 9, "batch2/b": 5, "c": 12, "empty": 0}
    (tmp_path / "videos").mkdir()
    found = []
    for name, length in lengths.items():
        path = tmp_path / "videos" / f"{Path(name).name}.mp4"
        path.write_bytes(name.encode())
        found.append(FeatureSource(name, path, length))
    return found


@pytest.fixture
def cache(tmp_path):
    return FeatureCache(tmp_path / "features", LAYOUT, encoder="tiny", options={"size": 64})


def check_all(cache, sources):
    for source in sources:
        found = cache.load(source)
        assert list(found) == ["tokens", "valid"]  # wide types first
        for name, values in expected(source).items():
            assert found[name].dtype == LAYOUT.arrays[name][1]
            np.testing.assert_array_equal(found[name], values)


# --------------------------------------------------------------------------------- write and read
def test_what_goes_in_comes_out(cache, sources):
    progress = []
    files = cache.fill(sources, rows_of, progress=lambda *numbers: progress.append(numbers))
    assert set(files) == {"a", "batch2/b", "c", "empty"}
    assert all(path.is_file() for path in files.values())
    assert progress[0] == (0, 26)
    assert progress[-1] == (26, 26)
    assert [done for done, _ in progress] == sorted({done for done, _ in progress})
    check_all(cache, sources)
    copied = cache.load(sources[0], memory_map=False)
    assert not isinstance(copied["tokens"], np.memmap)
    assert isinstance(cache.load(sources[0])["tokens"], np.memmap)
    # Any program can read the files.
    plain = safetensors.numpy.load_file(files["a"])
    np.testing.assert_array_equal(plain["tokens"], expected(sources[0])["tokens"])


def test_what_is_there_is_not_computed_again(cache, sources):
    cache.fill(sources[:2], rows_of)
    computed = []

    def encode(source):
        computed.append(source.name)
        return rows_of(source)

    cache.fill(sources, encode)
    assert computed == ["c", "empty"]
    progress = []
    cache.fill(sources, encode, progress=lambda *numbers: progress.append(numbers))
    assert computed == ["c", "empty"]
    assert progress == [(26, 26)]


def test_sizes_are_known_before_and_exact(cache, sources):
    before = cache.estimate(sources)
    assert not cache.folder.exists()
    assert (before.num_trials, before.num_done, before.fits) == (4, 0, True)
    assert before.missing_bytes == before.total_bytes
    files = cache.fill(sources, rows_of)
    assert sum(path.stat().st_size for path in files.values()) == before.total_bytes
    after = cache.estimate(sources)
    assert (after.num_done, after.missing_bytes) == (4, 0)
    assert str(after).startswith("4 trials, 3.") or "kB; 4 are ready, 0 B to be written" in str(
        after
    )


def test_the_sizes_of_the_usual_levels():
    frames = 2_630_000
    assert FeatureLayout.patches(256, 1024).bytes_per_frame * frames == pytest.approx(1.38e12, 0.01)
    assert FeatureLayout.regions(12, 1024).bytes_per_frame * frames == pytest.approx(70e9, 0.01)


# Spawned processes import it, so it is a module of its own.
ENCODERS = """
import torch
def rows_of(source):
    if not source.num_frames:
        return
    frames = torch.arange(source.num_frames)
    tokens = frames[:, None, None] + sum(source.name.encode())
    tokens = tokens.expand(-1, 3, 2) * torch.tensor([1.0, 0.5])
    yield {"tokens": tokens, "valid": frames % 3 != 0}
"""


def test_several_processes_write_the_same_files(tmp_path, cache, sources, monkeypatch):
    cache.fill(sources, rows_of)
    (tmp_path / "encoders_of_this_test.py").write_text(ENCODERS)
    monkeypatch.syspath_prepend(tmp_path)
    encode = importlib.import_module("encoders_of_this_test").rows_of
    other = FeatureCache(tmp_path / "other", LAYOUT, encoder="tiny", options={"size": 64})
    progress = []
    other.fill(sources, encode, jobs=2, progress=lambda *numbers: progress.append(numbers))
    assert progress[-1] == (26, 26)
    for source in sources:
        assert other.file_of(source.name).read_bytes() == cache.file_of(source.name).read_bytes()


# ------------------------------------------------------------------------------ several machines
def test_ranks_together_do_everything_once(cache, sources):
    computed = []

    def encode(source):
        computed.append(source.name)
        return rows_of(source)

    estimates = [cache.estimate(sources, rank=rank, world_size=3) for rank in range(3)]
    assert sum(e.total_bytes for e in estimates) == cache.estimate(sources).total_bytes
    for rank in (2, 0, 1):  # in any order, whatever is there already
        cache.fill(sources, encode, rank=rank, world_size=3)
    assert sorted(computed) == ["a", "batch2/b", "c", "empty"]
    check_all(cache, sources)


# -------------------------------------------------------------------------------- stop and resume
# Run as a script, and in this process to compare with.
SLOW = """
import pathlib, sys, time
import torch
from mmau.data.feature_cache import FeatureCache, FeatureLayout, FeatureSource
folder, videos, log = map(pathlib.Path, sys.argv[1:4])
def encode(source):
    with log.open("a") as file:
        file.write(source.name + "\\n")
    for frame in range(source.num_frames):
        time.sleep(float(sys.argv[4]))
        yield {"tokens": torch.full((1, 3, 2), float(frame))}
sources = [FeatureSource(p.stem, p, 20 - i) for i, p in enumerate(sorted(videos.iterdir()))]
cache = FeatureCache(folder, FeatureLayout({"tokens": ((3, 2), "float16")}), encoder="slow")
cache.fill(sources, encode)
"""


def test_kill_and_the_same_command_again(tmp_path, monkeypatch):
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in "abcdef":
        (videos / f"{name}.mp4").write_bytes(name.encode())

    def command(folder, log, pause):
        return [sys.executable, "-c", SLOW, str(tmp_path / folder), str(videos),
                str(tmp_path / log), str(pause)]  # fmt: skip

    killed = subprocess.Popen(command("killed", "log", 0.01))
    finished = tmp_path / "killed" / "b.safetensors"
    deadline = time.monotonic() + 60
    while not finished.is_file() or not list((tmp_path / "killed").glob(".c.*")):
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    left = sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert [name for name in left if not name.startswith(".")] == ["a.safetensors", "b.safetensors"]
    assert any(name.startswith(".c.") for name in left)  # the half file, under another name
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed").glob("[ab].*")}
    (tmp_path / "log").unlink()
    subprocess.run(command("killed", "log", 0), check=True)
    assert (tmp_path / "log").read_text().split() == ["c", "d", "e", "f"]
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}
    whole = command("whole", "log2", 0)
    monkeypatch.setattr(sys, "argv", whole[2:])
    exec(SLOW, {})
    contents = [
        {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}
        for folder in ("killed", "whole")
    ]
    assert sorted(contents[0]) == [f"{name}.safetensors" for name in "abcdef"]
    assert contents[0] == contents[1]


def test_a_full_disk_leaves_no_half_file(cache, sources):
    big = FeatureSource("big", sources[0].path, 400)
    cache.fill(sources[:1], rows_of)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(DiskFullError, match=r"the disk is full; .*big\.safetensors"):
            cache.fill([big], rows_of)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in cache.folder.iterdir()] == ["a.safetensors"]


def test_a_disk_that_is_too_small_is_reported_before_work_starts(cache, sources, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    assert not cache.estimate(sources).fits
    with pytest.raises(CacheError, match=r"the features of 4 trials need \d\.\d kB, but 100 B are"):
        cache.fill(sources, pytest.fail)


def test_one_broken_trial_stops_no_other(cache, sources):
    sources[1].path.unlink()

    def encode(source):
        if source.name == "c":
            yield next(iter(rows_of(source)))
            raise MediaError("the video is damaged: c.mp4")
        yield from rows_of(source)

    progress = []
    with pytest.raises(FeatureCacheError, match="no features of 2 of 4 trials: ") as caught:
        cache.fill(sources, encode, progress=lambda *numbers: progress.append(numbers))
    assert caught.value.failures["c"] == "the video is damaged: c.mp4"
    assert caught.value.failures["batch2/b"].startswith("no such file: ")
    assert set(caught.value.files) == {"a", "empty"}
    assert progress[-1] == (26, 26)
    assert sorted(path.name for path in cache.folder.iterdir()) == [
        "a.safetensors",
        "empty.safetensors",
    ]
    check_all(cache, [sources[0], sources[3]])


# --------------------------------------------------------------------------------- stale, corrupt
def test_every_single_flipped_byte_is_noticed(cache, sources):
    source = sources[1]
    path = cache.fill([source], rows_of)[source.name]
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in range(0, len(good), 2):
        bad = bytearray(good)
        bad[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        with pytest.raises(CacheError):
            cache.load(source)
    path.write_bytes(good)
    check_all(cache, [source])


def test_altered_and_cut_files_raise_and_say_what_to_do(cache, sources):
    files = cache.fill(sources, rows_of)
    path, good = files["a"], files["a"].read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(CacheError, match=r"altered after it was written; delete it: .*a\.safeten"):
        cache.load(sources[0])
    assert cache.load(sources[0], verify=False)["tokens"].shape == (9, 3, 2)
    assert list(cache.find_broken(sources)) == ["a"]
    path.write_bytes(good[:-1])
    with pytest.raises(CacheError, match=r"not a complete file of features; delete it"):
        cache.load(sources[0])
    with pytest.raises(CacheError, match=r"not a complete file .*`overwrite=True` replaces it"):
        cache.fill(sources, pytest.fail)
    cache.fill(sources, rows_of, overwrite=True)
    assert cache.find_broken(sources) == {}
    path.unlink()
    with pytest.raises(CacheError, match=r"no such file of features: .*a\.safetensors"):
        cache.load(sources[0])
    safetensors.numpy.save_file({"x": np.zeros(2)}, path)
    with pytest.raises(
        CacheError, match=r"not a file of features of this version .* but 'somethin"
    ):
        cache.load(sources[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"encoder": "other"}, "encoder was tiny and is now other"),
        ({"options": {"size": 96}}, r"options was \{'size': 64\} and is now \{'size': 96\}"),
        ({"layout": FeatureLayout({"tokens": ((3, 2), "float32")})}, "layout was .* and is now"),
    ],
)
def test_features_of_something_else_are_stale(tmp_path, cache, sources, change, words):
    cache.fill(sources, rows_of)
    settings = {"layout": LAYOUT, "encoder": "tiny", "options": {"size": 64}, **change}
    other = FeatureCache(tmp_path / "features", **settings)
    for use in (
        lambda: other.load(sources[0]),
        lambda: other.fill(sources, pytest.fail),
        lambda: other.estimate(sources),
    ):
        with pytest.raises(CacheError, match=f"the file of features is stale .*{words}.*delete"):
            use()


def test_a_changed_source_makes_its_features_stale(cache, sources, monkeypatch):
    cache.fill(sources, rows_of)
    sources[0].path.write_bytes(b"another video")
    with pytest.raises(CacheError, match=r"source_bytes was 1 and is now 13.*a\.safetensors"):
        cache.load(sources[0])
    longer = FeatureSource("c", sources[2].path, 13)
    with pytest.raises(CacheError, match="num_frames was 12 and is now 13"):
        cache.load(longer)
    monkeypatch.setitem(cache._made_by, "torch", "1.0")
    with pytest.raises(CacheError, match=r"torch was .* and is now 1\.0"):
        cache.load(sources[2])


# ----------------------------------------------------------------------------- wrong arguments
@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ({"tokens": torch.ones(9, 3, 2)}, ValueError, "must hold tokens, valid; got tokens"),
        ({"tokens": torch.ones(9, 3, 2), "valid": torch.ones(8)}, ValueError, "same number of row"),
        ({"tokens": torch.ones(9, 2, 3), "valid": torch.ones(9)}, ValueError, r"shape \(3, 2\); g"),
        ({"tokens": torch.ones(8, 3, 2), "valid": torch.ones(8)}, ValueError, "8 rows for 9 frame"),
        ({"tokens": torch.ones(10, 3, 2), "valid": torch.ones(10)}, ValueError, "more rows, 10"),
        (
            {"tokens": torch.full((9, 3, 2), torch.nan), "valid": torch.ones(9)},
            FeatureCacheError,
            r"value of 'tokens' is NaN or infinite in rows 0 to 8 \(it is so already\)",
        ),
        (
            {"tokens": torch.full((9, 3, 2), 1e5), "valid": torch.ones(9)},
            FeatureCacheError,
            r"\(it overflows float16\)",
        ),
    ],
)
def test_rows_that_do_not_fit(cache, sources, rows, error, message):
    with pytest.raises(error, match=message):
        cache.fill(sources[:1], lambda source: [rows])
    assert list(cache.folder.iterdir()) == []


def test_bfloat16_is_accepted(tmp_path, sources):
    cache = FeatureCache(tmp_path / "f", FeatureLayout({"x": ((), "float32")}), encoder="e")
    cache.fill(sources[:1], lambda source: [{"x": torch.full((9,), 1.5, dtype=torch.bfloat16)}])
    assert cache.load(sources[0])["x"].tolist() == [1.5] * 9


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c, s: FeatureLayout({}), ValueError, "at least one array"),
        (lambda c, s: FeatureLayout({"x": ((), "bfloat16")}), ValueError, "`dtype of 'x'` must be"),
        (lambda c, s: FeatureLayout({"x": ((0,), "bool")}), ValueError, "`sizes of 'x'` must be"),
        (lambda c, s: c.file_of("../a"), ValueError, r"must stay inside the folder; got '\.\./a'"),
        (lambda c, s: c.file_of(""), ValueError, "must stay inside the folder"),
        (lambda c, s: c.fill([s[0], s[0]], rows_of), ValueError, "two sources are called 'a'"),
        (lambda c, s: c.fill(s, rows_of, jobs=0), ValueError, "`jobs` must be in"),
        (lambda c, s: c.fill(s, rows_of, rank=2, world_size=2), ValueError, "`rank` must be in"),
        (lambda c, s: c.estimate(s, world_size=0), ValueError, "`world_size` must be in"),
        (
            lambda c, s: FeatureCache("x", LAYOUT, encoder={"name": object()}),
            TypeError,
            "not JSON serializable",
        ),
        (lambda c, s: prepared_sources({"a": "no/such"}), CacheError, "no such prepared file: no/"),
    ],
)
def test_wrong_arguments_raise(cache, sources, call, error, message):
    with pytest.raises(error, match=message):
        call(cache, sources)


# ---------------------------------------------------------------------- from trials to the tokens
class Patches(nn.Module):
    """Each token is the mean colour of its patch, and the number of images seen is counted."""

    def __init__(self):
        super().__init__()
        self.images = 0
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images):
        self.images += len(images)
        tokens = nn.functional.avg_pool2d(images, 8).flatten(2).transpose(1, 2)
        return tokens * self.scale, (4, 4)


@pytest.fixture
def prepared(tmp_path):
    rng = np.random.default_rng(0)
    t = 10
    valid = np.ones(t, dtype=bool)
    valid[[0, 4, 5, 6, 7]] = False
    crops = rng.integers(0, 256, (t, 32, 32, 3), dtype=np.uint8)
    crops[~valid] = 0
    landmarks = rng.uniform(0, 32, (t, 68, 2)).astype(np.float32)
    landmarks[~valid] = np.nan
    trial = PreparedTrial(
        name="v",
        crops=crops,
        landmarks=landmarks,
        valid=valid,
        confidence=valid.astype(np.float32),
        timestamps=np.arange(t) / 25,
        waveform=None,
        audio_start=0.0,
        num_frames_announced=t,
    )
    return trial, save_trial(trial, tmp_path / "prepared" / "v.safetensors", fingerprint="{}")


@pytest.mark.parametrize("frames_per_chunk", [1, 2, 4, 100])
def test_tokens_of_a_prepared_trial(tmp_path, prepared, frames_per_chunk):
    trial, path = prepared
    (source,) = prepared_sources({"v": path})
    assert source.num_frames == 10
    encoder, mapper = Patches().eval(), LandmarkToPatch()
    images = torch.from_numpy(trial.crops).movedim(-1, 1).float() / 255
    with torch.no_grad():
        tokens, grid = encoder(images)
        weights, known = mapper(torch.from_numpy(trial.landmarks), grid, (32, 32))
    encoder.images = 0
    rows = list(token_rows(source, encoder=encoder, frames_per_chunk=frames_per_chunk))
    assert encoder.images <= 10 - 5 + len(rows)  # frames without a face cost nothing
    found = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    assert found["valid"].tolist() == trial.valid.tolist()
    torch.testing.assert_close(found["patch_tokens"][trial.valid], tokens[trial.valid])
    assert not found["patch_tokens"][~trial.valid].any()

    cache = FeatureCache(tmp_path / "f", FeatureLayout.regions(13, 3), encoder="patches")
    cache.fill(
        [source],
        lambda s: token_rows(s, encoder=encoder, regions=mapper, frames_per_chunk=frames_per_chunk),
    )
    stored = cache.load(source)
    assert not stored["region_valid"][~trial.valid].any()
    np.testing.assert_array_equal(stored["region_valid"][trial.valid], known[trial.valid])
    pooled = torch.einsum("tmp,tpd->tmd", weights, tokens)[trial.valid]
    np.testing.assert_allclose(stored["regions"][trial.valid], pooled, atol=1e-3)
    np.testing.assert_allclose(
        stored["overall"][trial.valid], tokens.mean(1)[trial.valid], atol=1e-3
    )
    assert not stored["overall"][~trial.valid].any()


def test_an_encoder_in_training_mode_raises(prepared):
    (source,) = prepared_sources({"v": prepared[1]})
    with pytest.raises(ValueError, match=r"in training mode, .* call \.eval\(\) first"):
        list(token_rows(source, encoder=Patches()))


def test_a_trained_encoder_has_another_fingerprint():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    before = module_fingerprint(module)
    assert before == module_fingerprint(module)
    module.eval()
    assert before == module_fingerprint(module)
    module.train()(torch.randn(4, 2))  # the buffers of the batch norm move
    assert before != module_fingerprint(module)


def test_a_copied_trial_is_the_same_source(tmp_path, prepared):
    cache = FeatureCache(tmp_path / "f", FeatureLayout.regions(13, 3), encoder="patches")
    (source,) = prepared_sources({"v": prepared[1]})
    copy = tmp_path / "elsewhere.safetensors"
    copy.write_bytes(prepared[1].read_bytes())
    os.utime(copy, ns=(1, 1))
    assert cache.fingerprint(FeatureSource("v", copy, 10)) == cache.fingerprint(source)
    save_trial(PreparedTrial(**{**vars(prepared[0]), "confidence": np.zeros(10, np.float32)}), copy)
    assert cache.fingerprint(FeatureSource("v", copy, 10)) != cache.fingerprint(source)


def test_trials_are_opened_once_and_sent_to_workers_closed(cache, sources):
    cache.fill(sources, rows_of)
    trials = cache.trials(sources)
    assert trials["a"]["tokens"] is trials["a"]["tokens"]
    assert list(trials) == ["a", "batch2/b", "c", "empty"]
    assert len(trials) == 4
    sent = pickle.loads(pickle.dumps(trials))
    assert isinstance(sent["a"]["tokens"], np.memmap)
    path = cache.file_of("c")
    path.write_bytes(path.read_bytes()[:-1] + b"\7")
    assert cache.trials(sources, verify=False)["c"]["valid"].shape == (12,)
    with pytest.raises(CacheError, match="altered after it was written"):
        sent["c"]


def test_clips_read_from_the_cache(cache, sources):
    cache.fill(sources, rows_of)
    labels = {s.name: {"labels": np.full((s.num_frames, 12), 1, np.int8)} for s in sources}
    trials = cache.trials(sources, labels)
    data = ClipDataset(trials, 4, lengths=trials.lengths)
    assert len(data) == 3 + 2 + 3
    clip = data[2]
    assert (clip["trial"], clip["frame_ids"].tolist()) == ("a", [8, -1, -1, -1])
    assert clip["tokens"].dtype == torch.float16
    np.testing.assert_array_equal(clip["tokens"][0], expected(sources[0])["tokens"][8])
    assert clip["labels"][0].tolist() == [1] * 12
    path = cache.file_of("c")
    path.write_bytes(path.read_bytes()[:-1] + b"\7")
    with pytest.raises(CacheError, match="altered after it was written"):
        data[-1]
