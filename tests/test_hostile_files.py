"""Hostile files: whatever a file holds, it is loaded as it was saved or refused in one line, and nothing else."""

import dataclasses
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import fuzz_checkpoints as fuzzing
from ebm_lit import training
from ebm_lit.cli import data_from, main, read_json, settings_from
from ebm_lit.data import digits, image_folder, read_image
from ebm_lit.training import (
    CheckpointError,
    TrainConfig,
    TrainState,
    check_data,
    init_state,
    load_checkpoint,
    plain_json,
    read_checkpoint,
    save_checkpoint,
    train,
)

TINY = TrainConfig(n_iterations=6, batch_size=4, n_steps=2, buffer_size=8, width=2, hidden=4, sample_steps=2)
Change = Callable[[dict, dict[str, Tensor]], object]


@pytest.fixture(scope="module")
def state() -> TrainState:
    calls = iter(range(9))
    return train(digits("train")[0], TINY, progress=False, stop=lambda: next(calls) == 3)


@pytest.fixture(scope="module")
def sound(state, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("sound") / "c"
    save_checkpoint(state, path)
    return path.read_bytes()


@pytest.fixture
def path(tmp_path, sound) -> Path:
    """A sound checkpoint."""
    (tmp_path / "c.safetensors").write_bytes(sound)
    return tmp_path / "c.safetensors"


def refused(path: Path, *words: str, energy: nn.Module | None = None) -> None:
    """Loading raises `CheckpointError`: one printable line that names the file and holds these words."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, energy=energy)
    says = str(caught.value)
    assert says.startswith(f"{path}: ") and says.isprintable() and all(word in says for word in words), says


def forge(path: Path, change: Change) -> None:
    """Change header and tensors of a checkpoint and compute its checksum anew."""
    header, tensors = read_checkpoint(path)
    change(header, tensors)
    path.write_bytes(training._pack(header, tensors))


# --- the fuzzer -----------------------------------------------------------------------------------------------------


def test_fuzz():
    """2,000 cases: 1,600 checkpoints and 400 files of settings."""
    for cases, settings in ((1600, False), (400, True)):
        found = fuzzing.fuzz(cases, seed=0, settings=settings)
        assert not found["failures"], found["failures"][:5]
        kinds = {key.split(":")[0] for key in found["counts"]}
        assert sum(found["counts"].values()) == cases and len(kinds) == (5 if settings else 12)
        assert len(found["reasons"]) > (5 if settings else 30)  # the files are refused for many reasons


@pytest.mark.slow
def test_fuzz_at_length():
    """20,000 checkpoints and 5,000 files of settings that are stored nowhere else."""
    for cases, settings in ((20_000, False), (5_000, True)):
        found = fuzzing.fuzz(cases, seed=1, settings=settings)
        assert not found["failures"], found["failures"][:5]


def test_stored_fuzz_result_is_clean(root):
    stored = json.loads((root / "benchmarks" / "results" / "fuzz.json").read_text())
    for name, cases in (("checkpoints", 20_000), ("settings", 5_000)):
        counts = stored[name]["counts"]
        assert stored[name]["failures"] == [] and sum(counts.values()) == cases
        assert {key.split(": ")[1] for key in counts} == {"loaded", "refused"}
        assert sum(n for key, n in counts.items() if key.endswith("loaded")) > cases / 20  # it is no wall


@pytest.mark.skipif(not hasattr(os, "setsid"), reason="the judge uses POSIX signals")
def test_the_judge_sees_what_it_must_see(tmp_path):
    """The fuzzer's own mutation check: a loader that does wrong is found out."""
    code = f"""
import json, pickle, signal, sys, time
import fuzz_checkpoints as f
from pathlib import Path
def alarm(*_): raise f.Hang
signal.signal(signal.SIGALRM, alarm)
f.PATIENCE, f.SECONDS = 0.5, 0.2
guard, kept = f.Guard(), []
def grow(): kept.append(bytearray(2**28)); return "loaded"
def spin():
    stop = time.process_time() + 0.3
    while time.process_time() < stop: pass
    return "loaded"
def refuse(text): raise ValueError(text)
cases = dict(
    pickle=lambda: pickle.loads(pickle.dumps(Path("x"))) and "loaded",
    write=lambda: Path({str(tmp_path / "canary")!r}).write_text("x") and "loaded",
    other=lambda: {{}}["x"], grow=grow, hang=lambda: time.sleep(5), slow=spin,
    lines=lambda: refuse("two\\nlines"), clear=lambda: refuse("a clear reason"), fine=lambda: "loaded",
)
print(json.dumps({{name: f.judged(case, ValueError, guard, 100)[0] for name, case in cases.items()}}))
"""
    env = {**os.environ, "PYTHONPATH": str(Path(fuzzing.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert "pickle.find_class" in found["pickle"] and "open" in found["write"]
    assert (found["other"], found["hang"]) == ("KeyError", "Hang") and found["slow"] in ("too slow", "Hang")
    assert found["lines"] == "an unfit message" and found["clear"] == "refused" and found["fine"] == "loaded"
    assert "MiB" in found["grow"] or sys.platform != "linux"


# --- damage ---------------------------------------------------------------------------------------------------------


def test_every_bit_counts(tmp_path, sound):
    """A bit flipped in any of the header's bytes, and in 200 other places, is refused."""
    header = 8 + int.from_bytes(sound[:8], "little")
    r = random.Random(0)
    for at in [*range(0, header, 7), *(r.randrange(header, len(sound)) for _ in range(200))]:
        damaged = bytearray(sound)
        damaged[at] ^= 1 << r.randrange(8)
        (tmp_path / "c").write_bytes(damaged)
        refused(tmp_path / "c")


def test_damaged_data_is_recognised_by_its_checksum(path, sound):
    path.write_bytes(sound[:-5] + bytes([sound[-5] ^ 1]) + sound[-4:])
    refused(path, "checksum does not match")
    with pytest.raises(CheckpointError, match="checksum"):
        read_checkpoint(path)


def test_two_savings_of_one_run_are_the_same_file(state, path, sound):
    save_checkpoint(state, path)
    assert path.read_bytes() == sound


def test_what_could_not_be_read_back_is_not_written(state, path, sound, monkeypatch):
    monkeypatch.setattr(training, "_LARGEST_JSON", 100)
    with pytest.raises(CheckpointError, match="too many to read back"):
        save_checkpoint(state, path)
    assert path.read_bytes() == sound


def test_a_file_is_read_without_waiting(tmp_path, path):
    """Folders, pipes and devices are refused at once; a link to a checkpoint is one."""
    (tmp_path / "link").symlink_to(path)
    assert load_checkpoint(tmp_path / "link").step == 4
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    refused(tmp_path / "lost", "no such file")
    refused(tmp_path, "a folder")
    refused(path / "inside", "")
    (tmp_path / "empty").touch()
    refused(tmp_path / "empty")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        done = threading.Event()
        threading.Thread(target=lambda: (refused(tmp_path / "pipe", "pipe"), done.set()), daemon=True).start()
        assert done.wait(10)
    for device in filter(os.path.exists, ("/dev/zero", "/dev/null")):
        refused(Path(device), "device")


def test_pickles_and_archives_run_nothing(tmp_path):
    bomb = pickle.dumps(fuzzing.Payload(str(tmp_path / "canary")))
    r = random.Random(0)
    for content in [bomb, *(fuzzing.foreign(b"", r, str(tmp_path / "canary")) for _ in range(60))]:
        (tmp_path / "c.safetensors").write_bytes(content)
        refused(tmp_path / "c.safetensors")
    assert not (tmp_path / "canary").exists()
    pickle.loads(bomb).close()  # the payload is real
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["../../x", "/{}/x", "a\0b", "energy./../x"])
def test_names_are_never_paths(name, path, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    forge(path, lambda h, t: t.update({name.replace("/{}", str(elsewhere)): torch.zeros(1)}))
    refused(path, "is not expected")
    assert list(path.parent.iterdir()) == [path] and not list(elsewhere.iterdir())


# --- forgery --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda h, t: h.pop("moments"), "entry 'moments' is missing"),
        (lambda h, t: h.update(surprise=1), "entry 'surprise' is not expected"),
        (lambda h, t: h["config"].pop("width"), "setting 'width' is missing"),
        (lambda h, t: h["config"].update(width=True), "width must be"),
        (lambda h, t: h["config"].update(bounds="no"), "bounds must be"),
        (lambda h, t: h.update(config=[]), "config must be"),
        (lambda h, t: h.update(shape=[1, 8]), "shape must be"),
        (lambda h, t: h.update(shape=[1, 8.0, 8]), "shape must be"),
        (lambda h, t: h.update(network="os.system"), "network must be"),
        (lambda h, t: h.update(network="EnergyMLP"), "energy must be a EnergyMLP"),
        (lambda h, t: h.update(device="\x1b[31mred"), "device must be"),
        (lambda h, t: h.update(data_hash="\ud800" * 64), "data_hash must be"),
        (lambda h, t: h.update(step=True), "step must be"),
        (lambda h, t: h.update(step=7), "step must be"),
        (lambda h, t: h.update(step=5), "history must be"),
        (lambda h, t: h.update(step=3), "must be a count up to 3"),
        (lambda h, t: h.update(moments=[-1]), "moments must be"),
        (lambda h, t: h.update(moments=[0, 0]), "moments must be"),
        (lambda h, t: h.update(moments=[10**9]), ""),
        (lambda h, t: h.update(channels_last=["__class__"]), "channels_last must be"),
        (lambda h, t: h.update(channels_last=["net.0.bias"]), "channels_last must be"),
        (lambda h, t: h.update(rollbacks=[{"__class__": 1}]), ""),
        (lambda h, t: t["energy.net.0.weight"].view(-1)[0].fill_(torch.nan), "must be finite"),
        (lambda h, t: t["buffer.samples"].view(-1)[0].fill_(torch.inf), "must be finite"),
        (lambda h, t: t["optimizer.0.exp_avg"].view(-1)[0].fill_(torch.nan), "must be finite"),
        (lambda h, t: t["optimizer.0.exp_avg_sq"].view(-1)[0].fill_(-1), "must be squares"),
        (lambda h, t: t["optimizer.0.step"].fill_(99), "must be a count"),
        (lambda h, t: t["ema.n_averaged"].fill_(-1), "must be a count"),
        (lambda h, t: t["buffer.ages"][0].fill_(-1), "must be counts"),
        (lambda h, t: t.update(generator=t["generator"][:-1]), "state of a generator"),
        (lambda h, t: t.update(generator=t["generator"].float()), "state of a generator"),
        (lambda h, t: t["generator"][12].fill_(7), "state of a generator"),
    ],
)
def test_forgeries_are_refused(path, change, says):
    forge(path, change)
    refused(path, says)


def test_a_forged_generator_cannot_read_beyond_its_table(path):
    """PyTorch accepts a position of 624 with 624 words to go, and then reads what lies behind them."""

    def beyond(header: dict, tensors: dict[str, Tensor]) -> None:
        content = bytearray(tensors["generator"].numpy().tobytes())
        struct.pack_into("=i", content, 8, 624)
        struct.pack_into("=Q", content, 16, 624)
        tensors["generator"] = torch.frombuffer(content, dtype=torch.uint8)

    forge(path, beyond)
    torch.Generator().set_state(read_checkpoint(path)[1]["generator"])  # no error: that is why the loader looks
    refused(path, "state of a generator")


@pytest.mark.parametrize("draws", [0, 1, 7, 300, 623, 624, 625])
@pytest.mark.parametrize("kind", ["rand", "randn", "randn64"])
def test_every_state_of_a_generator_is_restored(draws, kind):
    g, copy = torch.Generator().manual_seed(draws), torch.Generator()
    dtype = torch.float64 if kind == "randn64" else torch.float32
    for _ in range(draws):
        torch.rand(1, generator=g) if kind == "rand" else torch.randn(1, generator=g, dtype=dtype)
    training._restore_generator(copy, g.get_state())
    assert torch.equal(torch.randn(700, generator=g), torch.randn(700, generator=copy))


GIANTS: list[dict] = [
    {"width": 10**6},
    {"width": 10**9},
    {"hidden": 10**9},
    {"width": 10**9, "hidden": 10**9},
    {"n_iterations": 10**9},
    {"buffer_size": 10**9},
    {"buffer_size": 10**9, "batch_size": 10**9},
    {"shape": [1, 100_000, 100_000]},
    {"shape": [2**31, 2**31, 2**31]},
    {"shape": [2**31]},
]


@pytest.mark.parametrize("giant", GIANTS, ids=str)
def test_what_a_header_promises_is_not_built(path, giant, monkeypatch):
    def change(header: dict, tensors: dict[str, Tensor]) -> None:
        header["config"] |= {k: v for k, v in giant.items() if k != "shape"}
        header["shape"] = giant.get("shape", header["shape"])
        header["network"] = "EnergyMLP" if len(header["shape"]) == 1 else "EnergyCNN"

    monkeypatch.setattr(training, "init_state", lambda *_: pytest.fail("a run was built"))
    forge(path, change)
    refused(path)


def test_deep_and_odd_json(path, sound):
    n = int.from_bytes(sound[:8], "little")
    layout = json.loads(sound[8 : 8 + n])
    header = json.loads(layout["__metadata__"]["ebm_lit"])
    text = json.dumps(header | {"sha256": fuzzing.BLANK})
    twice = text.replace('"step": 4', '"step": 4, "step": 4')
    assert twice != text
    for odd, says in (
        (text.replace('"step": 4', '"step": ' + "[" * 200_000 + "]" * 200_000), "nested too deeply"),
        (text.replace('"step": 4', '"step": ' + "9" * 5000), "too long"),
        (text.replace('"step": 4', '"step": NaN'), "finite"),
        (text.replace('"step": 4', '"step": 1e999'), "finite"),
        (twice, "'step' stands twice"),
        ("[]", "header must be"),
        (text + " " * 2**20, "bytes of JSON"),
        ("", ""),
    ):
        part = {"__metadata__": {"ebm_lit": odd}, **{k: v for k, v in layout.items() if k != "__metadata__"}}
        path.write_bytes(fuzzing.put_together(json.dumps(part), sound[8 + n :]))
        refused(path, says)
    path.write_bytes(fuzzing.put_together(json.dumps(layout | {"__metadata__": {"ebm_lit": text}}), sound[8 + n :]))
    assert load_checkpoint(path).step == 4  # the forger's tools are sound


def test_plain_json_reads_what_json_says():
    text = '{"a": [1, -2.5, 1e3, null, true, "\\u00e9"], "b": {}}'
    assert plain_json(text.encode()) == json.loads(text)
    for bad in (
        b"\xff",
        b"\xef\xbb\xbf{}",
        b"{",
        b"NaN",
        b"-Infinity",
        b"1e400",
        b"9" * 30,
        b'{"a":1,"a":2}',
        b"[" * 9999,
    ):
        with pytest.raises(ValueError):
            plain_json(bad)
    with pytest.raises(ValueError, match="at most 3 bytes"):
        plain_json(b"1234", largest=3)


def test_buffers_of_your_own_network_may_hold_anything(tmp_path):
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k = nn.Parameter(torch.tensor(0.1))
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

        def forward(self, x: Tensor) -> Tensor:
            return self.k * x.flatten(1).square().sum(-1)

    run = train(digits("train")[0], TINY, energy=Masked(), progress=False)
    save_checkpoint(run, tmp_path / "c")
    assert load_checkpoint(tmp_path / "c", energy=Masked()).energy.mask.tolist() == [0.0, -torch.inf]
    refused(tmp_path / "c", "must be a Masked")
    forge(tmp_path / "c", lambda h, t: t["energy.k"].fill_(torch.nan))
    refused(tmp_path / "c", "must be finite", energy=Masked())


# --- bounds that float32 rounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [(-0.1, 0.1), (0.1, 0.7), (-1 / 3, 1 / 3), (-1.0, 1.0)])
def test_data_on_the_bounds_are_in_the_box(bounds, tmp_path):
    ends = torch.tensor(bounds)  # rounded to float32, outwards in some cases
    x = ends[torch.randint(2, (20, 2), generator=torch.Generator().manual_seed(0))]
    check_data(x, bounds)
    config = dataclasses.replace(TINY, bounds=bounds, init_range=bounds, step_size=1e-3)
    save_checkpoint(train(x, config, progress=False), tmp_path / "c")
    assert load_checkpoint(tmp_path / "c").config.bounds == bounds
    for beyond in (
        torch.nextafter(ends[0], -torch.tensor(torch.inf)),
        torch.nextafter(ends[1], torch.tensor(torch.inf)),
    ):
        with pytest.raises(ValueError, match="within the bounds"):
            init_state(config, x.clone().fill_(beyond.item()))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_memory_is_bounded_by_the_size_of_the_file(tmp_path, path):
    """Loading 16 MB of chains takes at most four times as much at its peak."""
    config = dataclasses.replace(TINY, buffer_size=2**16)
    save_checkpoint(init_state(config, digits("train")[0]), tmp_path / "large")
    code = f"""
import fuzz_checkpoints as f
from ebm_lit.training import load_checkpoint
load_checkpoint({str(path)!r})
before = f.address_space()
load_checkpoint({str(tmp_path / "large")!r})
print(f.address_space() - before)
"""
    env = {**os.environ, "PYTHONPATH": str(Path(fuzzing.__file__).parent), "OMP_NUM_THREADS": "1"}
    grown = int(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True).stdout)
    assert grown < 4 * (tmp_path / "large").stat().st_size


# --- settings and the command line ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "JSON"),
        (b"[1, 2]", "JSON object"),
        (b"\xff\xfe{}", "JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"width": 3, "width": 4}', "'width' stands twice"),
        (b'{"step_size": 1e999}', "finite"),
        (b'{"step_size": NaN}', "finite"),
        (b'{"seed": ' + b"9" * 9999 + b"}", "too long"),
        (b'{"width": 1e3}', "width"),
        (b'{"config": 3}', "config"),
        (b'{"config": {}, "surprise": 1}', "surprise"),
        (b'{"config": {"width": 3}, "data": 5}', "data"),
        (b'{"config": {"width": 3}, "shape": "abc"}', "shape"),
        (b'{"config": {"width": 3}, "shape": [1, 1e9, 1]}', "shape"),
        (b'{"config": {"width": 3}, "shape": [1, 100000, 100000]}', "shape"),
        (b'{"../../x": 1}', "../../x"),
        (b'{"__class__": 1}', "__class__"),
        (b" " * (2**20 + 1), "bytes of JSON"),
    ],
)
def test_files_of_settings(content, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.json").write_bytes(content)
    with pytest.raises(ValueError, match=says.replace(".", r"\.")):
        values = read_json(Path("c.json"))
        settings_from(values, {}), data_from(values)
    result = CliRunner().invoke(main, ["train", "--config", "c.json", "--device", "cpu"])
    lines = result.stderr.splitlines()
    assert result.exit_code == 1 and len(lines) == 1 and lines[0].startswith("Error: ") and lines[0].isprintable()
    assert os.listdir() == ["c.json"]


def test_commands_refuse_hostile_files_in_one_line(tmp_path, monkeypatch, sound):
    monkeypatch.chdir(tmp_path)
    run = Path("runs/r")
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"data": "digits", "shape": None, "config": dataclasses.asdict(TINY)}))
    Image.new("L", (8, 8)).save("a.png")
    bomb, place = pickle.dumps(fuzzing.Payload("canary")), run / "checkpoint.safetensors"
    for content in (b"", bomb, sound[:-1], sound[:99] + b"\xff" + sound[100:], (2**40).to_bytes(8, "little") + bomb):
        place.write_bytes(content)
        for verb in ("info", "sample", "energy", "evaluate", "train"):
            words = [verb, *(["--resume", run] if verb == "train" else [place]), *["a.png"][: verb == "energy"]]
            words += ["--device", "cpu"] if verb != "info" else []
            result = CliRunner().invoke(main, [str(word) for word in words])
            lines = result.stderr.splitlines()
            assert result.exit_code == 1 and len(lines) == 1, (words, result.output)
            assert lines[0].startswith("Error: ") and "checkpoint.safetensors" in lines[0] and lines[0].isprintable()
        assert place.read_bytes() == content  # nothing was overwritten
    assert not Path("canary").exists()


# --- images -----------------------------------------------------------------------------------------------------------


def png_claiming(width: int, height: int) -> bytes:
    """A tiny PNG file whose header promises that size."""
    file = BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG")
    tiny = file.getvalue()
    head = b"IHDR" + struct.pack(">II", width, height) + tiny[24:29]
    return tiny[:12] + head + struct.pack(">I", zlib.crc32(head)) + tiny[33:]


def saved(image: Image.Image, kind: str = "PNG", **settings: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


GREY = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
BAD_IMAGES = {
    "empty": (b"", "it is empty"),
    "text": (b"this is no picture", "cannot identify"),
    "cut off": (saved(Image.effect_noise((60, 60), 90))[:900], "truncated"),
    "cut off jpeg": (saved(Image.effect_noise((60, 60), 90), "JPEG")[:900], "truncated"),
    "header only": (saved(GREY)[:33], ""),
    "bomb": (png_claiming(50_000, 50_000), "2500000000 pixels"),
    "half a bomb": (png_claiming(10_000, 10_000), "100000000 pixels"),
    "postscript": (POSTSCRIPT, "cannot identify"),
    "floats": (saved(Image.new("F", (8, 8)), "TIFF"), "mode F"),
    "32 bits": (saved(Image.new("I", (8, 8)), "TIFF"), "mode I"),
    "pickle": (pickle.dumps([1]), "cannot identify"),
    "bad checksum": (saved(GREY)[:-30] + b"\0" * 30, ""),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_images_that_cannot_be_read_are_named(name, tmp_path, recwarn, capfd):
    content, says = BAD_IMAGES[name]
    (tmp_path / "good.png").write_bytes(saved(GREY))
    (tmp_path / "broken.png").write_bytes(content)
    for call in (lambda: read_image(tmp_path / "broken.png"), lambda: image_folder(tmp_path, shape=(1, 8, 8))):
        with pytest.raises(ValueError, match=f"broken.png.*{says}") as caught:
            call()
        assert str(caught.value).isprintable()
    assert not recwarn.list and capfd.readouterr() == ("", "")


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png_claiming(50_000, 50_000))
    before = fuzzing.address_space()
    with pytest.raises(ValueError, match=r"bomb\.png"):
        read_image(tmp_path / "bomb.png", shape=(1, 8, 8))
    assert fuzzing.address_space() - before < 64 * 2**20  # 2.5 billion pixels would be 2,400 MiB


def test_folders_pipes_and_unreadable_files_are_no_images(tmp_path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match=r"folder\.png.*it is a folder"):
        read_image(tmp_path / "folder.png")
    with pytest.raises(ValueError, match=r"missing\.png.*No such file"):
        read_image(tmp_path / "missing.png")
    if hasattr(os, "mkfifo"):
        (tmp_path / "in").mkdir()
        os.mkfifo(tmp_path / "in" / "pipe.png")
        for call in (lambda: read_image(tmp_path / "in" / "pipe.png"), lambda: image_folder(tmp_path / "in")):
            with pytest.raises(ValueError, match=r"pipe\.png.*a pipe or a device"):
                call()
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "lost.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"lost\.png.*No such file"):  # a lost link is not passed over
        image_folder(tmp_path / "links")
    if hasattr(os, "geteuid") and os.geteuid() != 0:  # root may read everything
        (tmp_path / "secret.png").write_bytes(saved(GREY))
        (tmp_path / "secret.png").chmod(0)
        with pytest.raises(ValueError, match=r"secret\.png.*Permission denied"):
            read_image(tmp_path / "secret.png")


def test_an_unreadable_subfolder_is_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "a" / "0.png").write_bytes(saved(GREY))
    scan = os.scandir

    def denied(path: str) -> object:
        if Path(path).name == "deep":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(OSError, match=r"Permission denied.*deep"):
        image_folder(tmp_path)


def test_one_bad_file_in_a_thousand_is_named(tmp_path):
    for i in range(1000):
        (tmp_path / f"{i:03d}.png").write_bytes(saved(GREY))
    (tmp_path / "637.png").write_bytes(saved(GREY)[:50])
    with pytest.raises(ValueError, match=r"637\.png"):
        image_folder(tmp_path)
    result = CliRunner().invoke(
        main, ["train", "--data", str(tmp_path), "--device", "cpu", "--runs", str(tmp_path / "runs")]
    )
    lines = result.stderr.splitlines()
    assert result.exit_code == 1 and len(lines) == 1 and "637.png" in lines[0] and not (tmp_path / "runs").exists()


def level(content: bytes, tmp_path: Path) -> list[float]:
    """Channels of the first pixel, 0 … 255."""
    (tmp_path / "a.png").write_bytes(content)
    return [round(float(v), 1) for v in (read_image(tmp_path / "a.png")[:, 0, 0] + 1) * 127.5]


def test_every_mode_becomes_grey_or_colour(tmp_path):
    size = (4, 4)
    palette = Image.new("P", size, 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    film = [Image.new("L", size, v) for v in (50, 99)]
    cases = {
        "grey": (saved(Image.new("L", size, 100)), [100]),
        "bits": (saved(Image.new("1", size, 1)), [255]),
        "colour": (saved(Image.new("RGB", size, (1, 2, 3))), [1, 2, 3]),
        "palette": (saved(palette), [200, 100, 50]),
        "clear palette": (saved(palette, transparency=1), [255, 255, 255]),
        "clear": (saved(Image.new("RGBA", size, (0, 0, 0, 0))), [255, 255, 255]),
        "half clear": (saved(Image.new("RGBA", size, (0, 0, 0, 51))), [204, 204, 204]),
        "solid": (saved(Image.new("RGBA", size, (9, 8, 7, 255))), [9, 8, 7]),
        "grey, clear": (saved(Image.new("LA", size, (0, 0))), [255, 255, 255]),
        "16 bits": (saved(Image.fromarray(np.full(size, 257 * 70 + 200, dtype=np.uint16))), [70]),
        "cmyk": (saved(Image.new("CMYK", size, (0, 255, 255, 0)), "TIFF"), [255, 0, 0]),
        "film": (saved(film[0], "GIF", save_all=True, append_images=film[1:]), [50, 50, 50]),
        "pages": (saved(film[0], "TIFF", save_all=True, append_images=film[1:]), [50]),
        "lossless webp": (saved(Image.new("RGB", size, (1, 2, 3)), "WEBP", lossless=True), [1, 2, 3]),
    }
    assert {name: level(content, tmp_path) for name, (content, _) in cases.items()} == {
        n: v for n, (_, v) in cases.items()
    }


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"])
def test_damaged_images_are_read_or_named(kind, tmp_path, recwarn):
    """120 damaged files of each kind: an image or one line, nothing else."""
    noise = np.random.RandomState(0).randint(0, 256, (9, 11, 3)).astype(np.uint8)
    whole, r, outcomes = saved(Image.fromarray(noise), kind), random.Random(kind), set()
    for _ in range(120):
        change = r.choice([fuzzing.flipped, fuzzing.cut_off, fuzzing.scrambled])
        (tmp_path / "x.png").write_bytes(change(whole, r))
        try:
            x = read_image(tmp_path / "x.png", (3, 8, 8))
            assert x.shape == (3, 8, 8) and x.abs().max() <= 1
            outcomes.add("read")
        except ValueError as error:
            assert "x.png" in str(error) and str(error).isprintable()
            outcomes.add("named")
    assert outcomes == {"read", "named"} and not recwarn.list


def test_energy_answers_the_good_images_and_names_the_bad(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("good.png").write_bytes(saved(GREY))
    for name, (content, _) in BAD_IMAGES.items():
        Path(f"{name}.png").write_bytes(content)
    bad = [f"{name}.png" for name in BAD_IMAGES]
    result = CliRunner().invoke(main, ["energy", str(path), "good.png", *bad, "--device", "cpu"])
    lines = result.stderr.splitlines()
    assert result.exit_code == 1 and len(result.stdout.splitlines()) == 2 and "good.png" in result.stdout
    assert len(lines) == len(bad) and all(name in line for name, line in zip(bad, lines, strict=True))
