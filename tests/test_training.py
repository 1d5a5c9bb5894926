"""The loop, its monitor and its checkpoints: exact resumption, named failures, nothing lost."""

import dataclasses
import json
import math
import os

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ebm_lit import training
from ebm_lit.data import digits
from ebm_lit.energy import energy_and_grad
from ebm_lit.langevin import Langevin, NonFiniteError, uniform_init
from ebm_lit.training import (
    METRICS,
    CheckpointError,
    DivergenceError,
    TrainConfig,
    check_health,
    denoise,
    finish,
    generate,
    init_state,
    learning_rate,
    load_checkpoint,
    read_checkpoint,
    resolve_device,
    save_checkpoint,
    train,
    train_step,
)

TINY = TrainConfig(n_iterations=10, batch_size=16, n_steps=3, buffer_size=64, width=8, hidden=16, sample_steps=5)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return digits("train")[0]


def same(a: training.TrainState, b: training.TrainState) -> bool:
    """Every tensor of two runs, random state included, is equal bit for bit."""
    left, right = training._tensors(a), training._tensors(b)
    return left.keys() == right.keys() and all(
        u.dtype == right[k].dtype and u.detach().numpy().tobytes() == right[k].detach().numpy().tobytes()
        for k, u in left.items()
    )


def stop_after(n: int):
    calls = iter(range(1, 10_000))
    return lambda: next(calls) == n


# --- the loop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("negatives", ["buffer", "data", "noise"])
def test_same_seed_same_run(x, negatives):
    config = dataclasses.replace(TINY, negatives=negatives)
    first = train(x, config, progress=False)
    assert same(first, train(x, config, progress=False))
    other = train(x, dataclasses.replace(config, seed=1), progress=False)
    assert not same(first, other)
    assert not torch.equal(first.generator.get_state(), other.generator.get_state()), "the seed decides the noise, too"


def test_training_leaves_globals_and_data_alone(x):
    before, rng, threads = x.clone(), torch.get_rng_state(), torch.get_num_threads()
    train(x, TINY, progress=False)
    assert torch.equal(x, before)
    assert torch.equal(rng, torch.get_rng_state())
    assert torch.is_grad_enabled() and threads == torch.get_num_threads()


def test_average_follows_the_weights_exactly(x):
    state = init_state(dataclasses.replace(TINY, ema_decay=0.9), x)
    train_step(state, x)  # the first update of an average copies the weights
    expected = [p.detach().clone() for p in state.energy.parameters()]
    for _ in range(3):
        train_step(state, x)
        expected = [0.9 * e + 0.1 * p.detach() for e, p in zip(expected, state.energy.parameters(), strict=True)]
    for e, p in zip(expected, state.ema.parameters(), strict=True):
        torch.testing.assert_close(e, p, rtol=1e-5, atol=1e-7)


def test_one_update_is_adam_on_the_clipped_cd_gradient(x):
    """Adam's first update without momentum moves each weight by lr·g/(|g| + ε), where g is the clipped gradient."""
    config = dataclasses.replace(TINY, data_noise=0.0, alpha=0.3, warmup=0, weight_grad_clip=0.05)
    state, twin = init_state(config, x), init_state(config, x)
    x_pos = training.draw_data(twin, x)
    x_neg = training.draw_negatives(twin, x_pos).x
    e_pos, e_neg = twin.energy(x_pos), twin.energy(x_neg)
    loss = e_pos.mean() - e_neg.mean() + 0.3 * (e_pos.square().mean() + e_neg.square().mean())
    grads = torch.autograd.grad(loss, list(twin.energy.parameters()))
    norm = torch.stack([g.norm() for g in grads]).norm()
    assert norm > 0.05  # the clip is active
    train_step(state, x)
    for p, q, g in zip(state.energy.parameters(), twin.energy.parameters(), grads, strict=True):
        clipped = g * 0.05 / norm
        moved = q - config.learning_rate * clipped / (clipped.abs() + 1e-8)
        torch.testing.assert_close(p, moved, rtol=1e-3, atol=1e-5)


def test_minibatches_share_one_walk(x):
    """Two updates from one walk: the first as if its half were the batch, and each pair is used once."""
    config = dataclasses.replace(TINY, minibatches=2)
    state, twin = init_state(config, x), init_state(config, x)
    x_pos = training.draw_data(twin, x)
    x_neg = training.draw_negatives(twin, x_pos).x
    rows = [training.update(twin, x_pos[half], x_neg[half]) for half in (slice(0, 8), slice(8, 16))]
    assert not torch.equal(*rows)
    train_step(state, x)
    assert all(torch.equal(p, q) for p, q in zip(state.energy.parameters(), twin.energy.parameters(), strict=True))
    expected, norm = torch.stack(rows).mean(0), training.METRICS.index("grad_norm")
    expected[norm] = max(r[norm] for r in rows)  # the monitor must see the worst
    torch.testing.assert_close(state.history[0], expected)
    assert state.step == 1 and int(state.ema.n_averaged) == 2 and int((state.buffer.ages == 3).sum()) == 16


def test_learning_rate_reaches_the_optimiser(x):
    state = init_state(TINY, x)
    for step in range(3):
        train_step(state, x)
        assert state.optimizer.param_groups[0]["lr"] == learning_rate(TINY, step)
    assert learning_rate(TINY, 0) != learning_rate(TINY, 2)


def test_data_are_noised_and_kept_in_the_box(x):
    state = init_state(dataclasses.replace(TINY, batch_size=64, data_noise=0.2), x)
    batch = training.draw_data(state, x)
    assert batch.abs().max() <= 1
    grey = batch[(batch.abs() < 1)] * 8  # clean digits have 17 grey values only
    assert (grey - grey.round()).abs().mean() > 0.1
    clean = training.draw_data(init_state(dataclasses.replace(TINY, data_noise=0.0), x), x)
    assert (torch.cdist(clean.flatten(1), x.flatten(1)).min(1).values == 0).all()


@pytest.mark.parametrize("start", ["buffer", "data", "noise"])
def test_negatives_start_where_they_should(x, start, monkeypatch):
    state = init_state(dataclasses.replace(TINY, negatives=start, reinit_prob=0.0), x)
    starts = []
    sample = Langevin.sample

    def spy(self: Langevin, energy: nn.Module, x_init: Tensor, **settings: object) -> Tensor:
        starts.append(x_init.clone())
        return sample(self, energy, x_init, **settings)

    monkeypatch.setattr(Langevin, "sample", spy)
    before, x_pos = state.buffer.samples.clone(), training.draw_data(state, x)
    training.draw_negatives(state, x_pos)
    stored = (starts[0][:, None] == before[None]).flatten(2).all(2).any(1)
    assert torch.equal(starts[0], x_pos) == (start == "data")
    assert bool(stored.all()) == (start == "buffer")
    assert state.buffer.ages.sum() == (16 * 3 if start == "buffer" else 0)


@pytest.mark.parametrize(("age", "prob", "fresh"), [(None, 0.0, 0), (None, 1.0, 16), (1e-6, 0.0, 16), (1e9, 1.0, 0)])
def test_chains_restart_as_configured(x, age, prob, fresh):
    state = init_state(dataclasses.replace(TINY, reinit_age=age, reinit_prob=prob), x)
    state.buffer.ages += 2
    training.draw_negatives(state, x[:16])
    assert int((state.buffer.ages == 3).sum()) == fresh  # 3 steps old: started afresh
    assert int((state.buffer.ages == 5).sum()) == 16 - fresh


HOT = dataclasses.replace(TINY, noise_scale=0.05, data_noise=0.05, noise_start=0.4, anneal_steps=9)


def test_annealed_chains_age_and_anneal_on(x):
    """A chain that is drawn again goes on with the noise of its age; a fresh one starts hot."""
    state = init_state(dataclasses.replace(HOT, buffer_size=16, reinit_prob=0.0), x)
    seen = []
    for _ in range(4):
        start = state.generator.get_state()
        slots = torch.randperm(16, generator=torch.Generator().set_state(start))
        ages = state.buffer.ages[slots]
        negatives = training.draw_negatives(state, x[:16])
        assert torch.equal(negatives.ages, ages + 3) and torch.equal(negatives.x, state.buffer.samples[slots])
        seen.append(int(negatives.ages[0]))
    assert seen == [3, 6, 9, 12]
    assert HOT.sampler.sigma_at(torch.tensor([0, 9])).tolist() == pytest.approx([0.4, 0.05])
    start = init_state(dataclasses.replace(HOT, negatives="noise"), x)
    assert training.draw_negatives(start, x[:16]).ages.tolist() == [3] * 16


def test_data_get_the_noise_of_their_negatives():
    """The standard deviation of grey data with noise, by age. False alarm 8e-9: four at six standard errors."""
    grey = torch.zeros(16, 1, 20, 20)
    state = init_state(dataclasses.replace(HOT, bounds=(-4.0, 4.0)), grey)  # a box that cuts off nothing
    for age, expected in ((1, 0.4), (4, 0.2), (10, 0.05), (500, 0.05)):
        x = torch.cat([training.draw_data(state, grey) for _ in range(10)])
        y = training.match_noise(state, x, torch.full((160,), age))
        assert abs(y.std().item() / expected - 1) < 6 / (2 * y.numel()) ** 0.5
        assert torch.equal(x, y) == (age >= 10), "old chains change nothing"
    mixed = training.match_noise(state, torch.zeros(2, 1, 20, 20), torch.tensor([1, 10]))
    assert mixed[0].std() > 0.3 and (mixed[1] == 0).all(), "each its own"
    assert training.match_noise(state, 4 * torch.ones(2, 1, 20, 20), torch.tensor([1, 1])).max() <= 4
    plain = init_state(TINY, grey)
    before = plain.generator.get_state()
    assert training.match_noise(plain, grey, torch.ones(16)) is grey
    assert torch.equal(before, plain.generator.get_state()), "nothing is drawn without annealing"


def test_an_annealed_run_goes_on_bit_for_bit(x, tmp_path):
    whole = train(x, HOT, progress=False)
    path = tmp_path / "run.safetensors"
    train(x, HOT, checkpoint=path, stop=stop_after(4), progress=False)
    assert same(whole, train(x, state=load_checkpoint(path), progress=False))
    assert whole.metrics["energy_gap"].isfinite().all()
    cold = generate(whole, 4, 5, torch.Generator().manual_seed(0)).x
    whole.config = dataclasses.replace(HOT, noise_start=None, anneal_steps=0)
    assert not torch.equal(cold, generate(whole, 4, 5, torch.Generator().manual_seed(0)).x), "samples anneal, too"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"noise_start": 0.4}, "anneal_steps must be > 0 with noise_start"),
        ({"anneal_steps": 4}, "anneal_steps must be > 0 with noise_start, 0 without"),
        ({"noise_start": 0.01, "anneal_steps": 4}, "noise_start must be at least noise_scale"),
        ({"noise_start": 0.4, "anneal_steps": 4, "noise_scale": 0.0}, "noise_start must be at least noise_scale"),
        ({"noise_start": -1.0, "anneal_steps": 4}, "noise_start must be a number in"),
        ({"noise_start": 0.4, "anneal_steps": 4, "negatives": "data"}, "noise_start must be None where chains start"),
        ({"noise_start": 0.4, "anneal_steps": 1.5}, "anneal_steps must be a whole number"),
    ],
)
def test_annealing_settings_that_do_not_fit(settings, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**settings)


def test_samples_come_from_the_average_and_work_in_inference_mode(x):
    state = train(x, dataclasses.replace(TINY, ema_decay=0.5, learning_rate=0.1), progress=False)
    g = torch.Generator()
    ours = generate(state, 4, generator=g.manual_seed(1)).x
    start = uniform_init(4, (1, 8, 8), generator=g.manual_seed(1))
    networks = (state.ema.module, state.energy)
    average, last = (TINY.sampler.sample(net, start, n_steps=5, generator=g) for net in networks)
    assert ours.shape == average.shape and not torch.equal(average, last)
    g.manual_seed(1)
    start = uniform_init(4, (1, 8, 8), generator=g)
    assert torch.equal(ours, TINY.sampler.sample(state.ema.module, start, n_steps=5, generator=g))
    with torch.inference_mode():
        assert torch.equal(ours, generate(state, 4, generator=g.manual_seed(1)).x)
    with pytest.raises(ValueError, match="n must be"):
        generate(state, 0)


def test_schedule_by_hand():
    config = TrainConfig(n_iterations=110, warmup=10, learning_rate=1.0)
    assert [learning_rate(config, s) for s in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert learning_rate(config, 60) == pytest.approx(0.5)
    assert learning_rate(config, 110) == pytest.approx(0.0, abs=1e-12)
    kept = dataclasses.replace(config, final_rate=0.2)  # from 1 to 0.2: halfway at 0.6
    assert [learning_rate(kept, s) for s in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert [learning_rate(kept, s) for s in (10, 60, 110)] == pytest.approx([1.0, 0.6, 0.2])
    level = dataclasses.replace(config, final_rate=1.0)
    assert {learning_rate(level, s) for s in range(9, 111)} == {1.0}


def test_points_and_a_network_of_your_own():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.k = nn.Parameter(torch.tensor(0.1))

        def forward(self, x: Tensor) -> Tensor:
            return self.k * x.square().sum(-1)

    g = torch.Generator().manual_seed(0)
    points = torch.randn(500, 2, generator=g)
    chains = {"bounds": None, "step_size": 0.1, "noise_scale": 0.447}
    config = dataclasses.replace(TINY, n_iterations=150, learning_rate=0.02, **chains)
    own = train(points, config, energy=Own(), progress=False)
    assert 0.3 < own.energy.k.item() < 0.75  # the standard normal has E = ‖x‖²/2, so k = 0.5
    assert generate(own, 7).x.shape == (7, 2)


def test_callbacks_history_and_early_stop(x):
    seen = []
    state = train(x, TINY, progress=False, callbacks=[lambda s: seen.append(s.step)], callback_every=4)
    assert seen == [4, 8, 10]
    assert set(state.metrics) == set(METRICS) and all(len(v) == 10 for v in state.metrics.values())
    stopped = train(x, TINY, progress=False, stop=stop_after(3))
    assert stopped.step == 3 and stopped.history[3:].isnan().all() and len(stopped.metrics["loss"]) == 3


def test_progress_bar_is_silent_without_a_terminal(x, capfd):
    train(x, TINY)
    assert capfd.readouterr().err == ""


# --- the monitor ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "value", "signal"),
    [
        ("loss", float("nan"), "non-finite loss"),
        ("grad_norm", float("inf"), "non-finite grad_norm"),
        ("energy_gap", -51.0, "energy gap"),
    ],
)
def test_monitor_names_signal_and_step(x, column, value, signal):
    state = init_state(TINY, x)
    state.history[:5], state.step = 0.0, 5
    check_health(state)
    state.history[3, METRICS.index(column)] = value
    with pytest.raises(DivergenceError, match=f"{signal} at iteration 3: .*; try ") as caught:
        check_health(state)
    assert caught.value.signal == signal and caught.value.step == 3
    check_health(state, since=4)


def test_monitor_sees_saturation(x):
    state = init_state(TINY, x)
    state.history[:5], state.step = 0.0, 5
    state.history[:5, METRICS.index("saturation")] = 1.0
    with pytest.raises(DivergenceError, match="saturated negatives"):
        check_health(state)


def test_diverging_run_stops_and_keeps_the_last_good_checkpoint(x, tmp_path):
    """Saved every iteration, looked at every ten: no bad state may reach the file."""
    path = tmp_path / "c.safetensors"
    wild = dataclasses.replace(TINY, n_iterations=400, learning_rate=1.0, alpha=0.0, monitor_every=10)
    with pytest.raises(DivergenceError) as caught:
        train(x, wild, progress=False, checkpoint=path, checkpoint_every=1)
    kept = load_checkpoint(path)
    assert 0 < kept.step <= caught.value.step
    check_health(kept)


def test_checkpoints_appear_at_the_start_and_on_the_way(x, tmp_path):
    path = tmp_path / "c.safetensors"
    found = []
    train(x, TINY, progress=False, checkpoint=path, checkpoint_every=3, callback_every=1, callbacks=[
        lambda s: found.append(load_checkpoint(path).step)
    ])  # fmt: skip
    assert found == [0, 0, 3, 3, 3, 6, 6, 6, 9, 10]
    with pytest.raises(CheckpointError, match="cannot write"):  # at once, not at the first saving
        train(x, TINY, progress=False, checkpoint=tmp_path / "missing" / "c", callbacks=[lambda s: found.append(-1)])
    assert -1 not in found


def test_broken_chains_are_a_named_divergence(x):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.k = nn.Parameter(torch.tensor(float("nan")))

        def forward(self, x: Tensor) -> Tensor:
            return self.k * x.flatten(1).sum(-1)

    with pytest.raises(DivergenceError, match="non-finite negatives at iteration 0"):
        train(x, TINY, energy=Broken(), progress=False)


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", [1, 5, 9])
@pytest.mark.parametrize(("negatives", "minibatches"), [("buffer", 1), ("data", 1), ("buffer", 4)])
def test_resume_is_bit_exact(x, tmp_path, when, negatives, minibatches):
    config = dataclasses.replace(TINY, negatives=negatives, minibatches=minibatches)
    straight = train(x, config, progress=False)
    path = tmp_path / "c.safetensors"
    train(x, config, progress=False, checkpoint=path, stop=stop_after(when))
    loaded = load_checkpoint(path)
    assert loaded.step == when
    assert same(straight, train(x, state=loaded, progress=False))


def test_round_trip_before_the_first_update_and_after_the_last(x, tmp_path):
    fresh, done = init_state(TINY, x), train(x, TINY, progress=False)
    for state in (fresh, done):
        save_checkpoint(state, tmp_path / "c.safetensors")
        assert same(state, load_checkpoint(tmp_path / "c.safetensors"))
    train(x, state=load_checkpoint(tmp_path / "c.safetensors"), progress=False)  # nothing left to do: no error


def test_memory_format_survives(x, tmp_path):
    state = init_state(TINY, x)
    state.energy.to(memory_format=torch.channels_last)
    train_step(state, x)
    save_checkpoint(state, tmp_path / "c.safetensors")
    loaded = load_checkpoint(tmp_path / "c.safetensors")
    formats = [p.is_contiguous(memory_format=torch.channels_last) for p in state.energy.parameters() if p.ndim == 4]
    again = [p.is_contiguous(memory_format=torch.channels_last) for p in loaded.energy.parameters() if p.ndim == 4]
    assert formats == again
    assert same(state, loaded)


def test_a_loaded_run_does_not_live_in_the_file(x, tmp_path):
    """Overwriting the file in place must not change, or crash, the run that was loaded from it."""
    path = tmp_path / "c.safetensors"
    straight = train(x, TINY, progress=False)
    train(x, TINY, progress=False, checkpoint=path, stop=stop_after(4))
    loaded = load_checkpoint(path)
    with path.open("r+b") as file:
        file.write(b"\x00" * 64)
        file.truncate(64)
    assert same(straight, train(x, state=loaded, progress=False))


def test_networks_of_your_own_round_trip(x, tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            g = torch.Generator().manual_seed(0)
            self.w = nn.Parameter(torch.randn(64, 5, generator=g).t())  # not contiguous
            self.unused = nn.Parameter(torch.zeros(3))
            self.fixed = nn.Parameter(torch.ones(2), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return (x.flatten(1) @ self.w.t()).square().sum(-1) * self.fixed[0]

    config = dataclasses.replace(TINY, bounds=(0.25, 1.0), init_range=(0.25, 1.0), step_size=1e-3)
    inside, path = x.clamp(min=0.25), tmp_path / "c.safetensors"
    straight = train(inside, config, energy=Own(), progress=False)
    train(inside, config, energy=Own(), progress=False, checkpoint=path, stop=stop_after(4))
    assert same(straight, train(inside, state=load_checkpoint(path, energy=Own()), progress=False))
    with pytest.raises(CheckpointError, match="must be a Own"):
        load_checkpoint(path)


def test_loaded_tensors_are_plain_data(x, tmp_path):
    save_checkpoint(init_state(TINY, x), tmp_path / "c.safetensors")
    header, tensors = read_checkpoint(tmp_path / "c.safetensors")
    assert header["format"] == training.FORMAT and TrainConfig.from_dict(header["config"]) == TINY
    assert json.loads(json.dumps(header)) == header and all(isinstance(t, Tensor) for t in tensors.values())


def test_a_file_from_before_a_setting_goes_on_as_it_did(x, tmp_path):
    """What is missing in `_LATER` has its default, which is what was done; bit for bit as a file that says so."""
    path, straight = tmp_path / "c.safetensors", train(x, TINY, progress=False)
    train(x, TINY, progress=False, checkpoint=path, stop=stop_after(2))
    header, tensors = read_checkpoint(path)
    assert training._LATER.items() <= dataclasses.asdict(TrainConfig()).items()
    for name in training._LATER:
        header["config"].pop(name)
    path.write_bytes(training._pack(header, tensors))
    assert same(straight, train(x, state=load_checkpoint(path), progress=False))


def test_an_error_while_saving_keeps_the_previous_checkpoint(x, tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    state = init_state(TINY, x)
    save_checkpoint(state, path)
    before = path.read_bytes()
    train_step(state, x)

    def fail(*args):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(CheckpointError, match="cannot write the checkpoint: No space left"):
                save_checkpoint(state, path)
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["c.safetensors"]
    with pytest.raises(CheckpointError, match="cannot write"):
        save_checkpoint(state, tmp_path / "missing" / "c.safetensors")


def corruptions(whole: bytes):
    yield "truncated", whole[:-1]
    yield "half", whole[: len(whole) // 2]
    yield "empty", b""
    yield "pickle", b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94."
    yield "huge header", (2**60).to_bytes(8, "little") + whole[8:]
    yield "text", b"not a checkpoint at all, but long enough to be read as one"


def test_broken_files_are_refused_in_one_line(x, tmp_path):
    save_checkpoint(init_state(TINY, x), tmp_path / "good.safetensors")
    for name, content in corruptions((tmp_path / "good.safetensors").read_bytes()):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(tmp_path / "bad")
        assert "bad: " in str(caught.value) and "\n" not in str(caught.value), name
    with pytest.raises(CheckpointError, match="no such file"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path)


def test_foreign_and_unfitting_files_are_refused(x, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "c.safetensors"
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of ebm_lit"):
        load_checkpoint(path)

    def altered(change):
        save_checkpoint(train(x, TINY, progress=False, stop=stop_after(2)), path)
        header, tensors = read_checkpoint(path)
        change(header, tensors)
        path.write_bytes(training._pack(header, tensors))
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path)
        return str(caught.value)

    assert "is missing" in altered(lambda h, t: t.pop("energy.net.0.weight"))
    assert "not expected" in altered(lambda h, t: t.update(extra=torch.zeros(1)))
    assert "must be torch.float32" in altered(lambda h, t: t.update({"buffer.samples": t["buffer.samples"].double()}))
    assert "must be torch" in altered(lambda h, t: t.update({"history": t["history"][:3]}))
    assert "must be torch" in altered(lambda h, t: h["config"].update(width=16))  # another architecture
    assert "step must be" in altered(lambda h, t: h.update(step=99))
    assert "setting 'surprise' is not expected" in altered(lambda h, t: h["config"].update(surprise=1))
    assert "format must be" in altered(lambda h, t: h.update(format="ebm_lit.checkpoint.9"))


def test_a_run_continues_only_as_itself(x):
    state = train(x, TINY, progress=False, stop=stop_after(2))
    with pytest.raises(ValueError, match="x_data must be the data that this run was started with"):
        train(x[:-1], state=state, progress=False)
    with pytest.raises(ValueError, match="state already fixes config"):
        train(x, dataclasses.replace(TINY, seed=5), state=state, progress=False)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (torch.zeros(0, 1, 8, 8), "non-empty"),
        (torch.zeros(4, 8, 8), r"\(N, C, H, W\)"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.float64), "float32"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), "float32"),
        (torch.full((4, 1, 8, 8), 255.0), "within the bounds"),
        (torch.full((4, 1, 8, 8), float("nan")), "finite"),
        (torch.zeros(4, 1, 4, 4), "H, W >= 8"),
        ([[0.0]], "a tensor"),
    ],
)
def test_unusable_data(bad, expected):
    with pytest.raises(ValueError, match=expected) as caught:
        train(bad, TINY, progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_iterations", 0),
        ("batch_size", 2.5),
        ("minibatches", 0),
        ("minibatches", 7),
        ("n_steps", 0),
        ("step_size", 0.0),
        ("step_size", -1.0),
        ("noise_scale", -0.1),
        ("grad_clip", 0.0),
        ("bounds", (1.0, -1.0)),
        ("init_range", (1.0, 1.0)),
        ("reinit_prob", 1.5),
        ("reinit_age", 0.0),
        ("ema_decay", -0.1),
        ("alpha", -1.0),
        ("learning_rate", float("nan")),
        ("buffer_size", 8),
        ("negatives", "pcd"),
        ("noise_scale", None),
        ("sample_steps", 2.5),
        ("beta1", 1.0),
        ("seed", -1),
        ("seed", "x"),
        ("step_size", "2"),
        ("step_size", True),
        ("bounds", "ab"),
        ("bounds", (-1.0, 1.0, 2.0)),
        ("init_range", [-1]),
        ("init_range", (0.0, float("inf"))),
        ("learning_rate", 1e300),
        ("denoise", 1),
        ("denoise", "yes"),
    ],
)
def test_unusable_settings_are_named(name, value):
    with pytest.raises(ValueError, match=name) as caught:
        TrainConfig(**{name: value})
    assert "\n" not in str(caught.value)


def test_denoised_numbers_are_the_mean_of_what_may_stand_behind_them(device: torch.device):
    """Two clean values, −1 and 2, with weights 3 : 1 under noise s: their posterior mean is a sum over the two."""
    s, t = 0.8, 0.3
    values = torch.tensor([-1.0, 2.0], dtype=torch.float64, device=device)
    logits = torch.tensor([0.75, 0.25], dtype=torch.float64, device=device).log()

    def parts(x: torch.Tensor) -> torch.Tensor:
        return logits - (x - values).square() / (2 * s**2)

    x = torch.linspace(-4, 4, 2001, dtype=torch.float64, device=device)[:, None]  # more than one part
    found = denoise(lambda x: -t * parts(x).logsumexp(1), x, s, t)
    expected = (parts(x).softmax(1) * values).sum(1, keepdim=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    boxed = denoise(lambda x: -t * parts(x).logsumexp(1), x, s, t, bounds=(-0.5, 0.5))
    torch.testing.assert_close(boxed, expected.clamp(-0.5, 0.5), rtol=0, atol=1e-12)
    assert torch.equal(denoise(lambda x: x.sum(1), x, 0.0), x)


def test_samples_are_denoised_where_the_settings_say_so_and_chains_walk_on_as_they_were():
    x = digits("train")[0]
    noisy = train(x, TINY, progress=False)
    state = train(x, dataclasses.replace(TINY, denoise=True), progress=False)
    g = torch.Generator()
    plain = generate(noisy, 6, generator=g.manual_seed(0)).x
    chain = generate(state, 6, generator=g.manual_seed(0), finished=False)
    assert torch.equal(plain, chain.x), "training and chains do not ask"
    done = generate(state, 6, generator=g.manual_seed(0), trajectory=2)
    assert torch.equal(done.trajectory[-1], chain.x) and torch.equal(done.x, finish(state, chain.x))
    grad = energy_and_grad(state.ema.module, chain.x)[1]
    expected = chain.x - TINY.data_noise**2 / TINY.sampler.implied_temperature * grad
    torch.testing.assert_close(done.x, expected.clamp(-1, 1))
    assert not torch.equal(done.x, chain.x) and torch.equal(finish(noisy, plain), plain)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"noise": -1.0}, "noise must be"),
        ({"noise": math.nan}, "noise must be"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"bounds": (1.0, -1.0)}, "bounds must be"),
    ],
)
def test_nobody_denoises_with_nonsense(setting: dict, message: str):
    with pytest.raises(ValueError, match=message):
        denoise(lambda x: x.sum(1), torch.zeros(2, 3), **({"noise": 0.1} | setting))


def test_what_is_no_number_is_not_clamped_into_one():
    with pytest.raises(NonFiniteError, match="nothing can be denoised"):
        denoise(lambda x: (math.inf * x).sum(1), torch.ones(2, 3), 0.1, bounds=(-1.0, 1.0))


@pytest.mark.parametrize("noise_scale", [0.0, 1e-200])
def test_denoising_needs_chains_with_a_temperature(noise_scale: float):
    with pytest.raises(ValueError, match="noise_scale must be > 0 with denoise"):
        TrainConfig(noise_scale=noise_scale, denoise=True)


def test_settings_from_plain_values():
    assert TrainConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(TINY)))) == TINY
    with pytest.raises(ValueError, match="setting must be one of"):
        TrainConfig.from_dict({"n_step": 3})
    with pytest.raises(ValueError, match="learning_rate must be a number"):
        TrainConfig.from_dict({"learning_rate": "fast"})
    with pytest.raises(ValueError, match="the settings must be names and values"):
        TrainConfig.from_dict(3)  # type: ignore[arg-type]
    plain = TrainConfig(learning_rate=np.float32(0.5), bounds=[-1, 1], width=np.int64(4))
    assert json.loads(json.dumps(dataclasses.asdict(plain)))["learning_rate"] == 0.5 and plain.bounds == (-1.0, 1.0)


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in {"cpu", "cuda", "mps"}
    with pytest.raises(ValueError, match=r"cuda:99.* not available here"):
        resolve_device("cuda:99")
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda or mps"):
        resolve_device("abacus")


@pytest.mark.cuda
def test_whole_run_on_cuda(x, tmp_path):
    state = train(x.cuda(), TINY, progress=False, checkpoint=tmp_path / "c.safetensors", stop=stop_after(5))
    assert state.buffer.samples.is_cuda and state.history.is_cuda
    again = train(x.cuda(), state=load_checkpoint(tmp_path / "c.safetensors", "cuda"), progress=False)
    assert again.step == 10
    on_cpu = load_checkpoint(tmp_path / "c.safetensors", "cpu")
    assert train(x, state=on_cpu, progress=False).step == 10
