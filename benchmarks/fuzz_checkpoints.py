"""Hostile files: does the loader ever do anything but load a sound checkpoint or raise the documented error?

    python benchmarks/fuzz_checkpoints.py                       2,000 checkpoints and 500 files of settings
    python benchmarks/fuzz_checkpoints.py --cases 20000 --store and write benchmarks/results/fuzz.json

Case i of seed s is always the same file. About a third of the checkpoints are damaged as disks and attackers without
patience do it (bits flipped, cut off, header lengths forged, other formats); the others are forged with care: the
JSON, the layout or the tensors are changed and the checksum is computed anew, so that what comes after it is reached.
Cases run in a child process. A case fails if it ends in another exception, computes for more than five seconds, wants
more address space than four times the size of the file plus a constant, executes or imports anything, opens a file for
writing, or loads a run that is not complete and finite.
"""

import argparse
import contextlib
import copy
import faulthandler
import hashlib
import io
import json
import math
import os
import pickle
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ebm_lit import TrainConfig, __version__, digits, train
from ebm_lit.cli import read_json, settings_from
from ebm_lit.training import (
    CheckpointError,
    Rollback,
    TrainState,
    _tensors,
    init_state,
    load_checkpoint,
    save_checkpoint,
)

RESULTS = Path(__file__).resolve().parent / "results"
SECONDS, PATIENCE = 5.0, 30.0  # a case may compute for so long, and may take this long on a busy machine
FACTOR, CONSTANT = 4, 64 * 2**20  # and ask for this many times the file's size, plus this many bytes
BLANK = "0" * 64
Layout = dict[str, Any]


# --- sound files ----------------------------------------------------------------------------------------------------


def sound_files() -> list[bytes]:
    """Six small checkpoints of different kinds."""
    x, g = digits("train")[0], torch.Generator().manual_seed(0)
    tiny = {"batch_size": 4, "n_steps": 2, "buffer_size": 8, "hidden": 4, "sample_steps": 2}
    stops = iter(range(100))
    images = train(x, TrainConfig(n_iterations=6, width=2, **tiny), progress=False, stop=lambda: next(stops) == 3)
    plane = TrainConfig(n_iterations=3, width=3, bounds=None, **tiny)
    points = train(torch.randn(50, 2, generator=g), plane, progress=False)
    colours = train(torch.rand(9, 3, 8, 9, generator=g), TrainConfig(n_iterations=2, width=2, **tiny), progress=False)
    colours.energy.to(memory_format=torch.channels_last)
    back = copy.deepcopy(images)
    back.rollbacks = [Rollback("energy gap", 5, 4, 0.5)]
    finished = train(x, state=copy.deepcopy(images), progress=False)
    files = []
    with tempfile.TemporaryDirectory() as folder:
        for state in (images, points, colours, back, finished, init_state(images.config, x)):
            save_checkpoint(state, Path(folder) / "sound")
            files.append((Path(folder) / "sound").read_bytes())
    return files


def take_apart(content: bytes) -> tuple[Layout, dict[str, Any], bytes]:
    """Layout of the tensors, our header, and the tensors' bytes."""
    n = int.from_bytes(content[:8], "little")
    layout = json.loads(content[8 : 8 + n])
    return layout, json.loads(layout.pop("__metadata__")["ebm_lit"]), content[8 + n :]


def put_together(layout: str, data: bytes) -> bytes:
    """A file with any layout, and a checksum that fits if there is a place for one."""
    head = layout.encode("utf-8", "surrogatepass")
    head += b" " * (-len(head) % 8)
    entry = b'\\"sha256\\": \\"%s\\"'
    whole = hashlib.sha256(len(head).to_bytes(8, "little") + head + data).hexdigest().encode()
    sealed = head.replace(entry % BLANK.encode(), entry % whole)
    return len(head).to_bytes(8, "little") + sealed + data


def layout_text(layout: Layout, header: str, **more: str) -> str:
    """The JSON at the beginning of a file."""
    return json.dumps({"__metadata__": {"ebm_lit": header, **more}, **layout}, separators=(",", ":"))


def header_text(header: Any) -> str:
    """Our own JSON, with room for the checksum."""
    return json.dumps(header | {"sha256": BLANK} if isinstance(header, dict) and "sha256" in header else header)


# --- damage without care --------------------------------------------------------------------------------------------


class Payload:
    """Unpickling this leaves a file behind: the canary."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (self.canary, "w")


def flipped(content: bytes, r: random.Random, start: int = 0, stop: int | None = None) -> bytes:
    """A few bits turned over."""
    found = bytearray(content)
    for _ in range(r.choice((1, 1, 2, 8, 64))):
        found[r.randrange(start, stop or len(found))] ^= 1 << r.randrange(8)
    return bytes(found)


def in_header(content: bytes, r: random.Random) -> bytes:
    return flipped(content, r, 8, 8 + int.from_bytes(content[:8], "little"))


def cut_off(content: bytes, r: random.Random) -> bytes:
    return content[: r.choice((0, 1, 7, 8, 9, len(content) - 1, r.randrange(len(content))))]


def longer(content: bytes, r: random.Random) -> bytes:
    return content + r.choice((b"\0", b"\n", r.randbytes(100), content))


def forged_length(content: bytes, r: random.Random) -> bytes:
    n = int.from_bytes(content[:8], "little")
    far = (10**8, 2**31, 2**63, 2**64 - 1, r.randrange(2**20))
    lie = r.choice((0, 1, n - 1, n + 1, n + 8, len(content) - 8, len(content), *far))
    return lie.to_bytes(8, "little") + content[8:]


def scrambled(content: bytes, r: random.Random) -> bytes:
    a, b = sorted(r.sample(range(len(content)), 2))
    middle = r.choice((b"", bytes(b - a), r.randbytes(min(b - a, 5000)), content[a:b] * 2, content[a:b][::-1]))
    return content[:a] + middle + content[b:]


def foreign(content: bytes, r: random.Random, canary: str) -> bytes:
    """A file of another format, some of which would run code if anybody unpickled them."""
    bomb = pickle.dumps(Payload(canary), protocol=r.randrange(6))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", bomb)
        file.writestr("../../escape", b"out of the box")
    wrapped = len(bomb).to_bytes(8, "little") + bomb
    torched = io.BytesIO()
    torch.save({"x": torch.zeros(2)}, torched)
    texts = (b"", b"{}", b"not a checkpoint", b"\0" * r.randrange(4096), r.randbytes(r.randrange(4096)), b"[" * 99999)
    short = (2).to_bytes(8, "little") + b"{}"
    return r.choice((bomb, archive.getvalue(), wrapped, torched.getvalue(), short, bomb + content, *texts))


# --- forgery with care ----------------------------------------------------------------------------------------------


def hostile_value(r: random.Random) -> Any:
    """Something that does not belong there."""
    deep: Any = 0
    for _ in range(r.choice((1, 5, 90))):
        deep = r.choice(([deep], {"a": deep}))
    return r.choice(
        (
            *(None, True, False, 0, -1, 1, 2, 3, 7, 9, 64, 257, 1000, 10**5, 10**9, 2**31, 2**53, 2**63, 10**25),
            *(0.0, -0.5, 0.1, 1.5, 3.0, 1e-300, 1e30, 1e308, math.nan, math.inf, -math.inf),
            *("", "1", "none", "NaN", "x" * 5000, "../../x", "/etc/passwd", "a\0b", "\ud800", "\x1b[31m", "é\u202e"),
            *([], {}, [[]], [1, 2, 3], [1, 10**5, 10**5], [10**9] * 3, [0, 0, 0], [-1.0, 1.0], [2.0, 1.0], [1] * 500),
            *({"a": 1}, {"__class__": "os.system"}, "data", "noise", "EnergyMLP", "EnergyCNN", "cuda", "mps", deep),
        )
    )


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def altered(value: Any, r: random.Random) -> Any:
    """A JSON value with one or a few entries replaced, removed, added or renamed."""
    value = copy.deepcopy(value)
    for _ in range(r.choice((1, 1, 1, 2, 3))):
        path = r.choice([p for p in places(value) if p] or [()])
        if not path:
            return hostile_value(r)
        inside = value
        for key in path[:-1]:
            inside = inside[key]
        act = r.randrange(8)
        if act == 0:
            del inside[path[-1]]
        elif act == 1 and isinstance(inside, dict):
            inside[r.choice(("extra", "", "../../x", "__class__", "seed\0", "sha256", "width"))] = hostile_value(r)
        elif act == 2 and isinstance(inside, dict):
            inside[str(hostile_value(r))[:50]] = inside.pop(path[-1])
        elif act == 3 and type(number := inside[path[-1]]) in (int, float):
            inside[path[-1]] = r.choice((number + 1, -number, number * 2, str(number)))
        else:
            inside[path[-1]] = hostile_value(r)
    return value


def altered_text(text: str, r: random.Random) -> str:
    """JSON changed as text: what no writer of JSON would write."""
    numbers = (
        "1e999",
        "-1e999",
        "NaN",
        "Infinity",
        "9" * 5000,
        "0x10",
        "1_0",
        "+1",
        "01",
        "1e-999",
        '"\\ud800"',
        "tru",
    )
    number = r.choice(numbers)
    at = r.randrange(len(text))
    colons = [i for i, c in enumerate(text) if c == ":"] or [0]
    colon = r.choice(colons)
    stop = min((i for i in (text.find(c, colon) for c in ",}]") if i > 0), default=len(text))
    deep = r.choice((500, 20_000, 100_000))
    return r.choice(
        (
            text[: colon + 1] + number + text[stop:],
            text[: colon + 1] + "[" * deep + "]" * deep + text[stop:],
            text[: colon + 1] + '{"a":' * deep + "1" + "}" * deep + text[stop:],
            text[:-1] + "," + text[1:],  # every key twice
            text[:at] + text[at + 1 :],
            text[:at] + r.choice('{}[]",:\\\0\n\ufeff') + text[at:],
            text + " " * r.choice((1, 2**20)),
            text + text,
            "\ufeff" + text,
        )
    )


def json_forged(content: bytes, r: random.Random) -> bytes:
    layout, header, data = take_apart(content)
    if r.random() < 0.25:
        return put_together(layout_text(layout, altered_text(header_text(header), r)), data)
    part = r.choice(("config", "config", None))
    if part:
        header[part] = altered(header[part], r)
    else:
        header = altered(header, r)
    return put_together(layout_text(layout, header_text(header)), data)


def layout_forged(content: bytes, r: random.Random) -> bytes:
    layout, header, data = take_apart(content)
    name, other = r.sample(sorted(layout), 2)
    entry = layout[name]
    begin, end = entry["data_offsets"]
    shape, act, more = entry["shape"], r.randrange(12), {}
    if act == 0:
        entry["dtype"] = r.choice(("F64", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "C64", "F4", "I64", "x"))
    elif act == 1:
        shapes = (shape[::-1], [*shape, 1], shape[1:], [math.prod(shape)], [*shape, 0], [2**40, 2**40], [0])
        entry["shape"] = r.choice(shapes)
    elif act == 2:
        near = ([begin, end + 4], [begin - 4, end], [0, end - begin], [end, begin])
        entry["data_offsets"] = r.choice((*near, [begin, 2**62], [-1, 1], [begin], [0.0, 4.0]))
    elif act == 3:
        del layout[name]
    elif act == 4:
        names = ("extra", "../../x", "/nowhere/x", "a\0b", "", "energy.", "optimizer.0.x", "x" * 9999)
        layout[r.choice(names)] = layout.pop(name)
    elif act == 5:
        layout["extra"] = {"dtype": "U8", "shape": [0], "data_offsets": [len(data), len(data)]}
    elif act == 6:
        layout[name], layout[other] = layout[other], layout[name]
    elif act == 7:
        more = {r.choice(("format", "x", "../../x")): "pt"}
    elif act == 8:
        return put_together(altered_text(layout_text(layout, header_text(header)), r), data)
    elif act == 9:
        return put_together(json.dumps(altered(json.loads(layout_text(layout, header_text(header))), r)), data)
    elif act == 10:  # the same shapes in other dtypes of the same size
        entry["dtype"] = {"F32": "I32", "I64": "F64", "U8": "BOOL"}.get(entry["dtype"], "U8")
    else:
        lie = {"dtype": "F32", "shape": [10**5, 10**5], "data_offsets": [0, 4 * 10**10]}
        layout[r.choice((name, "energy.net.0.weight", "buffer.samples"))] = lie
    return put_together(layout_text(layout, header_text(header), **more), data)


def data_forged(content: bytes, r: random.Random) -> bytes:
    """Other values in the tensors; half of these files are sound."""
    layout, header, data = take_apart(content)
    full = [n for n, entry in layout.items() if entry["data_offsets"][0] < entry["data_offsets"][1]]
    name = r.choice(full + ["generator"] * 3)
    begin, end = layout[name]["data_offsets"]
    found = bytearray(data)
    if r.random() < 0.5:
        found[begin:end] = flipped(data[begin:end], r)
    else:
        at = begin + r.randrange((end - begin + 3) // 4) * 4
        words = (0x7FC00000, 0x7F800000, 0xFF800000, 0xFFFFFFFF, 0x7F7FFFFF, 0)  # NaN, ±∞, −1, the largest float, 0
        found[at : min(at + 4, end)] = r.choice(words).to_bytes(4, "little")[: end - at]
    return put_together(layout_text(layout, header_text(header)), bytes(found))


def grown(content: bytes, r: random.Random) -> bytes:
    """A configuration of a larger network, run or buffer than the file holds."""
    layout, header, data = take_apart(content)
    big = r.choice((64, 10**4, 10**6, 10**9))
    sizes = ("width", "hidden", "n_iterations", "buffer_size", "batch_size", "n_steps", "sample_steps")
    name = r.choice((*sizes, "shape"))
    if name == "shape":
        header["shape"] = r.choice(([1, big, big], [big, 8, 8], [3, 8, big], [big], [2, 2], [1, 8, 8, 8], [1, 7, 7]))
    else:
        header["config"] |= {name: big} | ({"buffer_size": 10**9} if r.random() < 0.2 else {})
    return put_together(layout_text(layout, header_text(header)), data)


Change = Callable[[bytes, random.Random], bytes]
CARELESS: list[Change] = [flipped, in_header, cut_off, longer, forged_length, scrambled]
CAREFUL: list[Change] = [json_forged, layout_forged, data_forged, grown]


def hostile_file(i: int, seed: int, sound: list[bytes], canary: str) -> tuple[str, bytes]:
    """Case i: the name of what was done, and the file."""
    r = random.Random(f"{seed}/{i}")
    content = r.choice(sound)
    if r.random() < 0.02:
        return "untouched", content
    if r.random() < 0.05:
        return "foreign", foreign(content, r, canary)
    change = r.choice(CARELESS) if r.random() < 1 / 3 else r.choice(CAREFUL)
    return change.__name__, change(content, r)


def hostile_settings(i: int, seed: int) -> tuple[str, bytes]:
    """Case i of the files for `--config`."""
    r = random.Random(f"settings/{seed}/{i}")
    values: Any = json.loads(json.dumps(vars(TrainConfig(width=r.randrange(1, 50)))))
    values = r.choice((values, {"width": 3}, {"data": "digits", "shape": None, "config": values}))
    text = json.dumps(values)
    kind = r.choice(("untouched", "altered", "altered", "altered_text", "altered_text", "flipped", "random"))
    if kind == "altered":
        return kind, json.dumps(altered(values, r)).encode()
    if kind == "altered_text":
        return kind, altered_text(text, r).encode("utf-8", "surrogatepass")
    if kind == "flipped":
        return kind, flipped(text.encode(), r)
    other = (b"", r.randbytes(200), text.encode("utf-16"), b"null")
    return kind, text.encode() if kind == "untouched" else r.choice(other)


# --- the judge ------------------------------------------------------------------------------------------------------


class Hang(BaseException):
    """Not an Exception, so that nobody turns it into a polite refusal."""


BANNED = ("pickle.", "exec", "compile", "import", "subprocess.", "os.", "socket.", "shutil.", "ctypes.", "marshal.")


class Guard:
    """Watches what code that runs under it does to the outside."""

    def __init__(self) -> None:
        self.watching, self.seen = False, set[str]()
        sys.addaudithook(self.hear)

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.watching:
            return
        writes = event == "open" and (set(str(args[1])) & set("wax+") or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        if writes or (event != "open" and event.startswith(BANNED)):
            self.seen.add(event)

    def __enter__(self) -> "Guard":
        self.seen, self.watching = set(), True
        return self

    def __exit__(self, *_: object) -> None:
        self.watching = False


def address_space() -> int:
    """The most address space that this process ever had, in bytes; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmPeak:"):
                return int(line.split()[1]) * 1024
    return 0


def is_whole(state: TrainState) -> bool:
    """All that a run needs is there and finite."""
    tensors = _tensors(state)
    finite = all(bool(torch.isfinite(t).all()) for k, t in tensors.items() if k != "history")
    finite &= bool(torch.isfinite(state.history[: state.step]).all())
    draws = torch.cat([torch.rand(3, generator=state.generator), torch.randn(3, generator=state.generator)])
    return finite and bool((draws.abs() < 100).all()) and 0 <= state.step <= state.config.n_iterations


def judged(case: Callable[[], str], error: type[Exception], guard: Guard, size: int) -> tuple[str, str]:
    """The outcome of one case: "loaded", "refused" or what went wrong; and the message."""
    before, started, says = address_space(), time.process_time(), ""
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        with guard:
            outcome = case()
    except error as refusal:
        outcome, says = "refused", str(refusal)
    except BaseException as other:
        outcome, says = f"{type(other).__name__}", str(other)[:300]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if guard.seen:
        outcome = f"did {sorted(guard.seen)}"
    elif "\n" in says or "memory" in says or not all(c.isprintable() for c in says):
        outcome = "an unfit message"
    elif address_space() - before > FACTOR * size + CONSTANT:
        outcome = f"took {(address_space() - before) / 2**20:.0f} MiB"
    elif time.process_time() - started > SECONDS:
        outcome = "too slow"
    return outcome, says


def run_cases(first: int, last: int, seed: int, settings: bool) -> dict[str, Any]:
    """Judge the cases first … last − 1 in this process."""

    def alarm(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, alarm)
    faulthandler.dump_traceback_later(3600, exit=True)
    torch.set_num_threads(1)
    guard, counts, failures, reasons = Guard(), Counter[str](), [], Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        path, canary = Path(folder) / "case.safetensors", Path(folder) / "canary"
        sound = [] if settings else sound_files()
        for content in sound:  # whatever is imported lazily is imported now
            path.write_bytes(content)
            assert is_whole(load_checkpoint(path))
        path.write_text("{}")
        assert settings_from(read_json(path), {}) == TrainConfig()
        slowest = 0.0
        for i in range(first, last):
            kind, content = hostile_settings(i, seed) if settings else hostile_file(i, seed, sound, str(canary))
            path.write_bytes(content)

            def checkpoint() -> str:
                return "loaded" if is_whole(load_checkpoint(path)) else "loaded what is not whole"

            def config() -> str:
                return "loaded" if isinstance(settings_from(read_json(path), {}), TrainConfig) else "no settings"

            started = time.process_time()
            case, error = (config, ValueError) if settings else (checkpoint, CheckpointError)
            outcome, says = judged(case, error, guard, len(content))
            slowest = max(slowest, time.process_time() - started)
            if canary.exists():
                outcome = "code was executed"
            counts[f"{kind}: {outcome}"] += 1
            if outcome == "refused":
                why = says.removeprefix(f"{path}: ").removeprefix("not a checkpoint of ebm_lit: ")
                reasons[" ".join(why.removeprefix("not a JSON file of settings: ").split()[:4])] += 1
            if outcome not in ("loaded", "refused") or (kind == "untouched" and outcome != "loaded"):
                failures.append({"case": i, "kind": kind, "outcome": outcome, "says": says})
    found = {"counts": dict(sorted(counts.items())), "failures": failures, "slowest_s": round(slowest, 3)}
    return found | {"reasons": reasons.most_common(40)}


def fuzz(cases: int, seed: int = 0, settings: bool = False) -> dict[str, Any]:
    """Judge so many cases in a child process; one that dies is a failure, too."""
    code = f"import json, fuzz_checkpoints as f; print(json.dumps(f.run_cases(0, {cases}, {seed}, {settings})))"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        how = f"died with {done.returncode}"
        died = {"case": None, "kind": "the process", "outcome": how, "says": done.stderr[-2000:]}
        return {"counts": {}, "failures": [died], "slowest_s": 0.0, "reasons": []}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000, help="checkpoints; a quarter as many files of settings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", action="store_true", help="write benchmarks/results/fuzz.json")
    args = parser.parse_args()
    versions = {"ebm_lit": __version__, "torch": torch.__version__, "python": platform.python_version()}
    result: dict[str, Any] = {"versions": versions, "cases": args.cases, "seed": args.seed}
    for name, n, settings in (("checkpoints", args.cases, False), ("settings", args.cases // 4, True)):
        started = time.perf_counter()
        result[name] = fuzz(n, args.seed, settings)
        result[name]["seconds"] = round(time.perf_counter() - started, 1)
        print(f"{name}: {n} cases, {len(result[name]['failures'])} failures, {result[name]['seconds']} s")
        for key, count in result[name]["counts"].items():
            print(f"  {count:6d}  {key}")
        for failure in result[name]["failures"][:20]:
            print("  FAILURE", failure)
    if args.store:
        (RESULTS / "fuzz.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    sys.exit(any(result[name]["failures"] for name in ("checkpoints", "settings")))


if __name__ == "__main__":
    main()
