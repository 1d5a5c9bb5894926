"""The mistakes that mutations.py plants: one snippet of one module each, and the tests that ought to notice.

They are mistakes that people make when they write such a library, collected from the formulas and promises of the book
before it was known which of them are caught. `tests` names files, or single tests that are tried first; all fast tests
of every file named are run before a mistake counts as a survivor.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mistake:
    """One snippet of `ebm_lit/<module>.py` and what a mistake makes of it."""

    name: str  # what is wrong, for the report
    module: str
    old: str  # stands in the module exactly once
    new: str
    tests: tuple[str, ...]  # test_file.py or test_file.py::test_name, the most specific first
    survives: str = ""  # why no test notices, if it is known that none does

    @property
    def files(self) -> tuple[str, ...]:
        """The files of the tests, each once."""
        return tuple(dict.fromkeys(test.partition("::")[0] for test in self.tests))


LANGEVIN, MALA, CD = "test_langevin.py", "test_mala.py", "test_contrastive_divergence.py"
TRAINING, LOST, HOSTILE, FAST = "test_training.py", "test_nothing_lost.py", "test_hostile_files.py", "test_fast.py"
LIKELIHOOD, QUALITY = "test_likelihood.py", "test_evaluation_quality.py"
LAWS, GAPS, DATA = "test_exact_laws.py", "test_mutation_gaps.py", "test_data.py"
ENERGY, BOLTZMANN = "test_energy.py", "test_boltzmann.py"

MISTAKES = (
    # --- boltzmann ------------------------------------------------------------------------------------------------
    Mistake(
        "log Z without the volume of a cell",
        "boltzmann",
        "return torch.logsumexp(-energies / temperature, 0).item() + math.log(cell_volume)",
        "return torch.logsumexp(-energies / temperature, 0).item()",
        (BOLTZMANN,),
    ),
    Mistake(
        "grid points on the cells' edges instead of their midpoints",
        "boltzmann",
        "(torch.arange(m, dtype=torch.float64) + 0.5)",
        "torch.arange(m, dtype=torch.float64)",
        (BOLTZMANN,),
    ),
    Mistake(
        "temperature missing in the probabilities of discrete states",
        "boltzmann",
        "weights = torch.exp(-(energies - lowest) / temperature)",
        "weights = torch.exp(-(energies - lowest))",
        (BOLTZMANN,),
    ),
    Mistake(
        "log density without the temperature",
        "boltzmann",
        "return -_one_each(energy(x), x) / temperature - log_z",
        "return -_one_each(energy(x), x) - log_z",
        (BOLTZMANN,),
    ),
    # --- energy ---------------------------------------------------------------------------------------------------
    Mistake(
        "shape of the energy: only the length is checked, (B, 1) passes",
        "energy",
        "x.ndim == 0 or e.shape != x.shape[:1]:",
        "x.ndim == 0 or len(e) != len(x):",
        (ENERGY, LANGEVIN),
    ),
    Mistake(
        "gradient of the mean energy instead of the sum, so it shrinks with the batch",
        "energy",
        "torch.autograd.grad(e.sum(), x,",
        "torch.autograd.grad(e.mean(), x,",
        (ENERGY, LANGEVIN),
    ),
    Mistake(
        "gradient keeps its graph",
        "energy",
        "torch.autograd.grad(e.sum(), x, allow_unused=True)",
        "torch.autograd.grad(e.sum(), x, create_graph=True, allow_unused=True)",
        (ENERGY, LANGEVIN),
    ),
    Mistake(
        "score with the sign of the gradient",
        "energy",
        "return -energy_and_grad(energy, x)[1] / temperature",
        "return energy_and_grad(energy, x)[1] / temperature",
        (ENERGY, BOLTZMANN),
    ),
    Mistake(
        "parameters left frozen for ever",
        "energy",
        "p.requires_grad_(flag)",
        "p.requires_grad_(False)",
        (ENERGY, LANGEVIN, TRAINING),
    ),
    Mistake(
        "train/eval mode not restored",
        "energy",
        "            m.training = mode",
        "            m.training = m.training",
        (ENERGY, LANGEVIN),
    ),
    Mistake(
        "an exception leaves the network frozen",
        "energy",
        """    try:
        energy.requires_grad_(False).eval()
        yield energy
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
        for m, mode in modes:
            m.training = mode""",
        """    energy.requires_grad_(False).eval()
    yield energy
    for p, flag in flags:
        p.requires_grad_(flag)
    for m, mode in modes:
        m.training = mode""",
        (ENERGY, LANGEVIN),
    ),
    Mistake(
        "confining term without its 2",
        "energy",
        "x.square().sum(-1) / (2 * self.confine**2)",
        "x.square().sum(-1) / self.confine**2",
        (ENERGY,),
    ),
    # --- langevin: ULA --------------------------------------------------------------------------------------------
    Mistake(
        "a chain climbs: sign of the gradient in its steps",
        "langevin",
        "x.sub_(torch.mul(s.clip(grad), eta, out=spare))",
        "x.add_(torch.mul(s.clip(grad), eta, out=spare))",
        (LANGEVIN,),
    ),
    Mistake(
        "sign of the gradient in the formula of one step",
        "langevin",
        "return x - step_size * grad + noise_scale * noise",
        "return x + step_size * grad + noise_scale * noise",
        (LANGEVIN,),
    ),
    Mistake(
        "√2 missing in σ",
        "langevin",
        "return math.sqrt(2 * step_size * temperature)",
        "return math.sqrt(step_size * temperature)",
        (LANGEVIN,),
    ),
    Mistake(
        "σ² for σ",
        "langevin",
        "return math.sqrt(2 * step_size * temperature)",
        "return 2 * step_size * temperature",
        (LANGEVIN,),
    ),
    Mistake(
        "temperature implied by σ instead of σ²",
        "langevin",
        "return noise_scale**2 / (2 * step_size)",
        "return noise_scale / (2 * step_size)",
        (LANGEVIN,),
    ),
    Mistake(
        "temperature dropped",
        "langevin",
        "noise_scale_for(self.step_size, 1.0 if self.temperature is None else self.temperature)",
        "noise_scale_for(self.step_size, 1.0)",
        (LANGEVIN,),
    ),
    Mistake(
        "noise shared between the coordinates",
        "langevin",
        "device=out.device, out=out)",
        "device=out.device, out=out)\n"
        "            first = out.flatten(2)[..., :1].clone()\n"
        "            out.copy_(first.view(*out.shape[:2], *[1] * (out.ndim - 2)).expand_as(out))",
        (LANGEVIN, LAWS),
    ),
    Mistake(
        "noise shared between the chains",
        "langevin",
        "device=out.device, out=out)",
        "device=out.device, out=out)\n            out.copy_(out[:, :1].clone().expand_as(out))",
        (LANGEVIN, LAWS),
    ),
    Mistake(
        "annealing one step late",
        "langevin",
        "** (ages / max(1, self.anneal_steps)).clamp(max=1.0)",
        "** ((ages - 1) / max(1, self.anneal_steps)).clamp(0.0, 1.0)",
        (LANGEVIN,),
    ),
    Mistake(
        "annealing falls in a straight line of σ, not by a constant factor",
        "langevin",
        "return start * (self.sigma / start) ** (ages / max(1, self.anneal_steps)).clamp(max=1.0)",
        "return start + (self.sigma - start) * (ages / max(1, self.anneal_steps)).clamp(max=1.0)",
        (LANGEVIN,),
    ),
    Mistake(
        "chains that continue start hot again",
        "langevin",
        "self.sampler.sigma_at(self.ages + steps)",
        "self.sampler.sigma_at(self.ages * 0 + steps)",
        (LANGEVIN,),
    ),
    Mistake(
        "all chains of a batch get the noise of the first",
        "langevin",
        "self.sampler.sigma_at(self.ages + steps)",
        "self.sampler.sigma_at((self.ages if isinstance(self.ages, int) else self.ages[:1]) + steps)",
        (LANGEVIN,),
    ),
    Mistake(
        "the steps of a block all take the first noise",
        "langevin",
        "in enumerate(zip(noise.unbind(),",
        "in enumerate(zip(noise[:1].expand_as(noise).unbind(),",
        (LANGEVIN, FAST),
    ),
    Mistake(
        "clip after instead of before: the step is clipped, not the gradient",
        "langevin",
        "x.sub_(torch.mul(s.clip(grad), eta, out=spare))",
        "x.sub_(s.clip(torch.mul(grad, eta, out=spare)))",
        (LANGEVIN,),
    ),
    Mistake(
        "clip ignored",
        "langevin",
        "return grad if self.grad_clip is None else grad.clamp(-self.grad_clip, self.grad_clip)",
        "return grad",
        (LANGEVIN,),
    ),
    Mistake(
        "bounds ignored",
        "langevin",
        "        x.clamp_(*s.bounds)",
        "        pass",
        (LANGEVIN,),
    ),
    Mistake(
        "bounds applied before the noise",
        "langevin",
        """.add_(omega)
    if s.bounds is not None:
        x.clamp_(*s.bounds)""",
        """
    if s.bounds is not None:
        x.clamp_(*s.bounds)
    x.add_(omega)""",
        (LANGEVIN,),
    ),
    Mistake(
        "the chain moves the caller's tensor",
        "langevin",
        """        self.done = 0  # steps whose noise was drawn; all are made before the next are drawn
        self.put(x)
""",
        """        self.done = 0
        self.state = x
        self.put(x)
""",
        (LANGEVIN, TRAINING),
    ),
    Mistake(
        "a compiled chain ends with a spare step",
        "langevin",
        "track.state.copy_(xs[now - 1])",
        "track.state.copy_(xs[-1])",
        (FAST,),
    ),
    Mistake(
        "compiled steps are not clipped",
        "langevin",
        "x = x - eta * sampler.clip(grad) + omega",
        "x = x - eta * grad + omega",
        (FAST,),
    ),
    Mistake(
        "a compiled energy is not asked for its errors",
        "fast",
        "            energy_and_grad(self.network, x)\n            self.sound.add(kind)\n",
        "            self.sound.add(kind)\n",
        (FAST,),
    ),
    Mistake(
        "the next chain moves the states of the last one",
        "langevin",
        "last = track.current().clone() if track.kept else track.current()",
        "last = track.current()",
        (FAST,),
    ),
    Mistake(
        "a recorded chain serves every sampler",
        "langevin",
        "last.n_steps == n_steps and _alike(last.sampler, sampler)",
        "last.n_steps == n_steps",
        (FAST,),
    ),
    Mistake(
        "samplers of a subclass that compare as equal share compiled steps",
        "langevin",
        "return a is b or (type(a) is type(b) is Langevin and a == b)",
        "return a == b",
        (FAST,),
    ),
    Mistake(
        "the noise on a GPU depends on the length of its graphs",
        "langevin",
        "each = max(1, min(5, 2**25 // x.numel()))",
        "each = max(1, min(n_steps, 250 if whole else 20, 2**25 // x.numel()))",
        (FAST,),
    ),
    Mistake(
        "a compiled energy that failed for one sampler is compiled for none",
        "langevin",
        "if last is None or last.k != k or last.run.is_crowded or not _alike(last.sampler, sampler):",
        "if last is None or last.k != k or not _alike(last.sampler, sampler) and not last.run.failure:",
        (FAST,),
    ),
    Mistake(
        "a recorded chain goes on where the last one ended",
        "langevin",
        "            track.begin(start, ages, generator)\n",
        '            if not hasattr(track, "done"):\n                track.begin(start)\n'
        "            track.done, track.ages, track.generator = 0, ages, generator\n",
        (FAST,),
    ),
    Mistake(
        "negatives not detached",
        "langevin",
        "return Chain(last, n, self.implied_temperature",
        "return Chain(last.requires_grad_(), n, self.implied_temperature",
        (CD, LANGEVIN),
    ),
    Mistake(
        "non-finite alarm ignored in a chain",
        "langevin",
        "            alarm.check(last)",
        "            pass",
        (LANGEVIN, TRAINING),
    ),
    Mistake(
        "the alarm watches the energy but not the gradient",
        "fast",
        "zip(sums.unbind(), (e, grad), strict=True)",
        "zip(sums.unbind(), (e, e), strict=True)",
        (LANGEVIN,),
    ),
    Mistake(
        "a block that leaves the engine is not put back",
        "langevin",
        """            self.copy_out()
            at = """,
        "            at = ",
        (FAST,),
    ),
    Mistake(
        "every block anneals by the ages of the first",
        "langevin",
        "_like_batch(sigma[:, block] if",
        "_like_batch(sigma[:, : block.stop - block.start] if",
        (FAST,),
    ),
    Mistake(
        "alarms of all blocks but the last are overwritten",
        "langevin",
        "zip(noise.unbind(), track.places[k][first:last], strict=True)",
        "zip(noise.unbind(), track.places[0][first:last], strict=True)",
        (FAST,),
    ),
    Mistake(
        "diagnostics measure the gradient after the clip",
        "langevin",
        "for t in (energy, _norms(grad), clipped.to(dtype)",
        "for t in (energy, _norms(sampler.clip(grad)), clipped.to(dtype)",
        (LANGEVIN,),
    ),
    # --- langevin: MALA -------------------------------------------------------------------------------------------
    Mistake(
        "MALA without accept/reject",
        "langevin",
        "allowed & torch.isfinite(e_new) & (temperature * u.log() <= margin)",
        "allowed & torch.isfinite(e_new)",
        (MALA,),
    ),
    Mistake(
        "ratio of the proposal densities missing",
        "langevin",
        "e.to(dtype) - e_new.to(dtype) + trapezoid + step_size * (slope.square() - slope_new.square()).sum(1) / 4",
        "e.to(dtype) - e_new.to(dtype)",
        (MALA,),
    ),
    Mistake(
        "ratio of the proposal densities upside down",
        "langevin",
        "+ trapezoid + step_size * (slope.square() - slope_new.square()).sum(1) / 4",
        "- trapezoid - step_size * (slope.square() - slope_new.square()).sum(1) / 4",
        (MALA,),
    ),
    Mistake(
        "one accept decision for the whole batch",
        "langevin",
        "(temperature * u.log() <= margin)",
        "(temperature * u[0].log() <= margin.mean())",
        (MALA,),
    ),
    Mistake(
        "one uniform number for all chains",
        "langevin",
        "u = 1 - torch.rand(len(x), generator",
        "u = 1 - torch.rand(1, generator",
        (MALA,),
    ),
    Mistake(
        "temperature missing in the accept decision",
        "langevin",
        "(temperature * u.log() <= margin)",
        "(u.log() <= margin)",
        (MALA,),
    ),
    Mistake(
        "√2 missing in MALA's proposal",
        "langevin",
        "(2 * temperature * eta_x) ** 0.5 * noise",
        "(temperature * eta_x) ** 0.5 * noise",
        (MALA,),
    ),
    Mistake(
        "MALA clamps proposals to the box instead of refusing them",
        "langevin",
        "        inside &= (new >= bounds[0]) & (new <= bounds[1])",
        "        new = new.clamp(*bounds)",
        (MALA,),
    ),
    Mistake(
        "a chain that stays keeps the gradient of the proposal",
        "langevin",
        "torch.where(take, grad_new, grad), accepted)",
        "grad_new, accepted)",
        (MALA,),
    ),
    Mistake(
        "adaptation pushes the step size the wrong way",
        "langevin",
        "2 * (rows[k, 1] - target)",
        "2 * (target - rows[k, 1])",
        (MALA,),
    ),
    Mistake(
        "the adapted sampler keeps the old step size",
        "langevin",
        "tuned = replace(self, step_size=math.exp(rows[n // 2 :, 0].mean().item()))",
        "tuned = replace(self)",
        (MALA,),
    ),
    # --- contrastive_divergence -----------------------------------------------------------------------------------
    Mistake(
        "data and negatives swapped in the loss",
        "contrastive_divergence",
        "gap = e_pos.mean() - e_neg.mean()",
        "gap = e_neg.mean() - e_pos.mean()",
        (CD,),
    ),
    Mistake(
        "sign of the regulariser",
        "contrastive_divergence",
        "return CDLoss(gap + regulariser, gap, regulariser)",
        "return CDLoss(gap - regulariser, gap, regulariser)",
        (CD,),
    ),
    Mistake(
        "regulariser squares the mean instead of averaging the squares",
        "contrastive_divergence",
        "e_pos.square().mean() + e_neg.square().mean()",
        "e_pos.mean().square() + e_neg.mean().square()",
        (CD,),
    ),
    Mistake(
        "chains written to other slots of the buffer",
        "contrastive_divergence",
        "self.samples[draw.slots] = x.detach()",
        "self.samples[: len(x)] = x.detach()",
        (CD,),
    ),
    Mistake(
        "states in the buffer keep their graph",
        "contrastive_divergence",
        "self.samples[draw.slots] = x.detach()",
        "self.samples[draw.slots] = x",
        (CD,),
    ),
    Mistake(
        "ages not advanced",
        "contrastive_divergence",
        "self.ages[draw.slots] = draw.ages + n_steps",
        "self.ages[draw.slots] = draw.ages",
        (CD,),
    ),
    Mistake(
        "a fresh chain inherits the age of the old one",
        "contrastive_divergence",
        "self.ages[slots].masked_fill(fresh, 0)",
        "self.ages[slots]",
        (CD,),
    ),
    Mistake(
        "re-initialisation ignored",
        "contrastive_divergence",
        "x = torch.where(fresh.view((n,) + (1,) * (kept.ndim - 1)), start, kept)",
        "x = kept",
        (CD,),
    ),
    Mistake(
        "one decision to start afresh for the whole batch",
        "contrastive_divergence",
        "fresh = torch.rand(n, generator=generator, device=device) < p",
        "fresh = (torch.rand(1, generator=generator, device=device) < p).expand(n)",
        (CD,),
    ),
    Mistake(
        "a slot may be drawn twice",
        "contrastive_divergence",
        "torch.randperm(len(self.samples), generator=generator, device=device)[:n]",
        "torch.randint(len(self.samples), (n,), generator=generator, device=device)",
        (CD,),
    ),
    Mistake(
        "a buffer's chains are not told their ages",
        "contrastive_divergence",
        "generator=generator, ages=draw.ages)",
        "generator=generator)",
        (TRAINING, CD),
    ),
    Mistake(
        "chains are not written back",
        "contrastive_divergence",
        "    buffer.write(draw, x, sampler.n_steps)\n",
        "",
        (CD,),
    ),
    # --- training -------------------------------------------------------------------------------------------------
    Mistake(
        "data and negatives swapped in the update",
        "training",
        "torch.cat([x_pos, x_neg])",
        "torch.cat([x_neg, x_pos])",
        (TRAINING,),
    ),
    Mistake(
        "gradients of the weights pile up",
        "training",
        "    state.optimizer.zero_grad()\n",
        "",
        (TRAINING,),
    ),
    Mistake(
        "gradient of the weights clipped after the update instead of before",
        "training",
        """    grad_norm = nn.utils.clip_grad_norm_(energy.parameters(), cfg.weight_grad_clip)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.step()
""",
        """    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.step()
    grad_norm = nn.utils.clip_grad_norm_(energy.parameters(), cfg.weight_grad_clip)
""",
        (TRAINING,),
    ),
    Mistake(
        "every update of an iteration gets the whole batch",
        "training",
        "[update(state, pos, neg) for pos, neg in parts]",
        "[update(state, x_pos, x_neg) for _ in parts]",
        (TRAINING,),
    ),
    Mistake(
        "counters of a checkpoint held to iterations, not to updates",
        "training",
        "    updates = step * minibatches\n",
        "    updates = step\n",
        (TRAINING,),
    ),
    Mistake(
        "learning-rate schedule computed but not used",
        "training",
        'group["lr"] = rate',
        'group["lr"] = cfg.learning_rate',
        (TRAINING,),
    ),
    Mistake(
        "cosine of the schedule does not end at zero",
        "training",
        "(1 + math.cos(math.pi * min(1.0, progress))) / 2",
        "(1 + math.cos(math.pi / 2 * min(1.0, progress))) / 2",
        (TRAINING,),
    ),
    Mistake(
        "warm-up missing",
        "training",
        "    if step < config.warmup:\n        return config.learning_rate * (step + 1) / config.warmup\n",
        "",
        (TRAINING,),
    ),
    Mistake(
        "average of the weights not updated",
        "training",
        "    state.ema.update_parameters(energy)\n",
        "",
        (TRAINING,),
    ),
    Mistake(
        "averaged weights not used by generate",
        "training",
        "cfg.sampler.run(state.ema.module, x_init",
        "cfg.sampler.run(state.energy, x_init",
        (TRAINING,),
    ),
    Mistake(
        "data beside hot chains stay clean",
        "training",
        "(r.square() - 1).clamp(min=0).sqrt()",
        "(r * 0)",
        (TRAINING,),
    ),
    Mistake(
        "noise added to the data's noise instead of variance to variance",
        "training",
        "(r.square() - 1).clamp(min=0).sqrt()",
        "(r - 1).clamp(min=0)",
        (TRAINING,),
    ),
    Mistake(
        "noise on the data forgotten",
        "training",
        "    x = x + cfg.data_noise * torch.randn(x.shape, generator=g, device=x.device)\n",
        "",
        (TRAINING,),
    ),
    Mistake(
        "denoising up the slope",
        "training",
        "part - s**2 / t *",
        "part + s**2 / t *",
        (TRAINING,),
    ),
    Mistake(
        "denoising at temperature 1",
        "training",
        "denoise(state.ema.module, x, cfg.data_noise, cfg.sampler.implied_temperature, cfg.bounds)",
        "denoise(state.ema.module, x, cfg.data_noise, 1.0, cfg.bounds)",
        (TRAINING,),
    ),
    Mistake(
        "chains that shall walk on are denoised, too",
        "training",
        "if finished else chain",
        "",
        (TRAINING,),
    ),
    Mistake(
        "a step without energies that nobody checks for overflow",
        "fast",
        "out=self.squares).mul_(self.scale)",
        "out=self.squares).zero_()",
        (FAST,),
    ),
    Mistake(
        "chains of an earlier block set off the alarm of a shorter one",
        "langevin",
        "self.engine.x[:, at[1].stop :] = 0",
        "pass",
        (FAST,),
    ),
    Mistake(
        "squares for the alarm without their scale: it rings early",
        "fast",
        "out=self.squares).mul_(self.scale)",
        "out=self.squares)",
        (FAST,),
    ),
    Mistake(
        "energies left out although they may overflow first",
        "fast",
        "self.lean &= r < kind.max * kind.eps / 4",
        "self.lean &= r == r",
        (FAST,),
    ),
    Mistake(
        "NumPy's norms before every chain, and its threads beside it",
        "fast",
        "torch.linalg.vector_norm(t, dtype=torch.float64)",
        "torch.tensor(__import__('numpy').linalg.norm(t.detach().double().numpy()))",
        ("test_threads.py",),
    ),
    Mistake(
        "the nodes of a quadrature computed anew at every step",
        "data",
        "@cache\ndef _legendre",
        "def _legendre",
        ("test_threads.py",),
    ),
    Mistake(
        "an infinite gradient clamped into a pixel",
        "training",
        "    if not torch.isfinite(clean).all():",
        "    if False:",
        (TRAINING,),
    ),
    Mistake(
        "long chains are judged with their noise, short ones without",
        "cli",
        "first, later = finish(state, chain), finish(state, later)",
        "first = finish(state, chain)",
        ("test_cli_evaluate.py",),
    ),
    Mistake(
        "the seed decides the weights but not the noise",
        "training",
        "generator = torch.Generator(device).manual_seed(config.seed)",
        "generator = torch.Generator(device).manual_seed(0)",
        (TRAINING,),
    ),
    Mistake(
        "the monitor lets infinities pass",
        "training",
        "bad = ~torch.isfinite(rows)",
        "bad = torch.isnan(rows)",
        (TRAINING, LOST),
    ),
    Mistake(
        "non-finite alarm ignored by the monitor",
        "training",
        "    if bad.any():",
        "    if False:",
        (TRAINING, LOST),
    ),
    Mistake(
        "the monitor sees a positive energy gap only",
        "training",
        "size, limit = rows[:, METRICS.index(name)].abs(), getattr",
        "size, limit = rows[:, METRICS.index(name)], getattr",
        (TRAINING, LOST),
    ),
    Mistake(
        "the monitor looks at the last iteration only",
        "training",
        "rows, cfg = state.history[since : state.step].cpu(), state.config",
        "rows, cfg = state.history[state.step - 1 : state.step].cpu(), state.config",
        (TRAINING, LOST),
    ),
    Mistake(
        "random state not restored on load",
        "training",
        '        _restore_generator(state.generator, saved["generator"])',
        "        pass",
        (TRAINING,),
    ),
    Mistake(
        "optimiser moments not restored on load",
        "training",
        '    _restore_optimizer(state, _under("optimizer.", saved))\n',
        "",
        (TRAINING,),
    ),
    Mistake(
        "history not restored on load",
        "training",
        '    state.history.copy_(saved["history"])\n',
        "",
        (TRAINING,),
    ),
    Mistake(
        "average of the weights not restored on load",
        "training",
        '    state.ema.load_state_dict(_under("ema.", saved))\n',
        "",
        (TRAINING,),
    ),
    Mistake(
        "ages of the chains not restored on load",
        "training",
        ".to(device, copy=True) for k in",
        '.to(device, copy=True).mul_(k == "samples") for k in',
        (TRAINING,),
    ),
    Mistake(
        "checksum of a checkpoint not verified",
        "training",
        'if head.count(seal) != 1 or _checksum(content, head.replace(seal, _seal(_BLANK))) != header["sha256"]:',
        "if head.count(seal) != 1:",
        (HOSTILE,),
    ),
    Mistake(
        "checkpoint written in place: no rename",
        "training",
        """        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
""",
        """        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
""",
        (TRAINING, LOST),
    ),
    Mistake(
        "checkpoint renamed before it is flushed to the disk",
        "training",
        "            os.fsync(file.fileno())\n",
        "",
        (LOST,),
    ),
    Mistake(
        "lock not taken",
        "training",
        "        lock.acquire()\n",
        "",
        (LOST,),
    ),
    Mistake(
        "lock kept when a run ends in an error",
        "training",
        """    try:
        remove_leftovers(path)
        yield
    finally:
        lock.release()""",
        """    remove_leftovers(path)
    yield
    lock.release()""",
        (LOST,),
        "CPython destroys the lock object, and with it the lock, as soon as the generator that holds it has ended; "
        "only an interpreter without reference counting would keep it",
    ),
    Mistake(
        "a run may be continued on other data",
        "training",
        "    if hash_data(x_data) != state.data_hash:",
        "    if len(hash_data(x_data)) != len(state.data_hash):",
        (TRAINING,),
    ),
    Mistake(
        "rollback does not restore the buffer",
        "training",
        '    state.buffer.samples.copy_(tensors["buffer.samples"])\n',
        "",
        (LOST,),
    ),
    Mistake(
        "rollback keeps the learning rate",
        "training",
        "learning_rate=cfg.learning_rate * cfg.rollback_factor)",
        "learning_rate=cfg.learning_rate)",
        (LOST,),
    ),
    Mistake(
        "rollback walks into the same noise again",
        "training",
        """    seed = torch.randint(2**31, (), generator=state.generator, device=state.generator.device)
    state.generator.manual_seed(int(seed))  #""",
        "    #",
        (LOST,),
    ),
    Mistake(
        "a snapshot that follows the run instead of a copy",
        "training",
        "{name: tensor.detach().clone() for name, tensor in _tensors(state).items()}",
        "{name: tensor.detach() for name, tensor in _tensors(state).items()}",
        (LOST,),
    ),
    # --- fast -----------------------------------------------------------------------------------------------------
    Mistake(
        "fast gradient: Swish's slope is σ alone",
        "fast",
        "torch.ops.aten.silu_backward.grad_input(g, z, grad_input=out)",
        "torch.mul(g, torch.sigmoid(z), out=out)",
        (FAST,),
    ),
    Mistake(
        "fast gradient: a row of the kernel missing on the way up",
        "fast",
        "            for ky in range(3)\n",
        "            for ky in range(2)\n",
        (FAST,),
    ),
    Mistake(
        "fast gradient: a row of the kernel missing on the way back",
        "fast",
        "[(y // 2, 2), (y // 2 + 1, 0)][: ho - y // 2]",
        "[(y // 2, 2)]",
        (FAST,),
    ),
    Mistake(
        "fast gradient: bias of the convolutions dropped",
        "fast",
        "self.z.copy_(self.bias.expand_as(self.z))",
        "self.z.zero_()",
        (FAST,),
    ),
    Mistake(
        "fast gradient: overlapping windows overwrite each other",
        "fast",
        "            place.add_(part)",
        "            place.copy_(part)",
        (FAST,),
    ),
    Mistake(
        "fast gradient: the last step's gradient is not cleared",
        "fast",
        "        self.g.zero_()\n",
        "",
        (FAST,),
    ),
    Mistake(
        "fast gradient: confining term half as steep",
        "fast",
        "alpha=1 / self.confine**2",
        "alpha=0.5 / self.confine**2",
        (FAST,),
    ),
    Mistake(
        "weights learn from the sum of the energies, not from the loss",
        "fast",
        "            g = g * slopes\n",
        "            pass\n",
        (FAST,),
    ),
    Mistake(
        "weights of the first convolution learn with rows and columns exchanged",
        "fast",
        "unflatten(1, shape).permute(0, 3, 1, 2), both[:, -1]",
        "unflatten(1, shape).permute(0, 3, 2, 1), both[:, -1]",
        (FAST,),
    ),
    Mistake(
        "learning with the weights of the first batch",
        "fast",
        """        self.engine.load(self.network)
        self.engine.x[0] = x
""",
        "        self.engine.x[0] = x\n",
        (FAST,),
    ),
    Mistake(
        "frozen parameters learn",
        "fast",
        "torch.empty_like(p).copy_(grad) if p.requires_grad else None",
        "torch.empty_like(p).copy_(grad)",
        (FAST,),
    ),
    Mistake(
        "fast gradient: stale weights not refreshed",
        "fast",
        "return energy.refresh(), energy.report",
        "return energy, energy.report",
        (FAST,),
    ),
    Mistake(
        "fast gradient: hooks not noticed",
        "fast",
        'return "forward" in vars(module) or any(len(v) > 0 for v in hooks)',
        'return "forward" in vars(module)',
        (FAST,),
    ),
    # --- evaluation: likelihood -----------------------------------------------------------------------------------
    Mistake(
        "AIS: the telescoping term is taken after the move",
        "evaluation",
        """            log_w = log_w - (beta - last) * rise
            ess.append(1 / log_w.softmax(0).square().sum())
            if k < len(steps):
                x, e, _, rate = stage.move(x, e, grad, steps[k], n_steps, generator)
                rates.append(rate)
""",
        """            if k < len(steps):
                x, e, _, rate = stage.move(x, e, grad, steps[k], n_steps, generator)
                rates.append(rate)
            log_w = log_w - (beta - last) * stage.begin(x)[2]
            ess.append(1 / log_w.softmax(0).square().sum())
""",
        (LIKELIHOOD,),
    ),
    Mistake(
        "AIS: sign of the weights",
        "evaluation",
        "log_w = log_w - (beta - last) * rise",
        "log_w = log_w + (beta - last) * rise",
        (LIKELIHOOD,),
    ),
    Mistake(
        "AIS: the reverse run walks the schedule forwards",
        "evaluation",
        "betas = path.betas[::-1] if reverse else path.betas",
        "betas = path.betas",
        (LIKELIHOOD,),
    ),
    Mistake(
        "AIS: the reverse run takes the step sizes of the forward run in order",
        "evaluation",
        "steps = path.step_sizes[::-1] if reverse else path.step_sizes",
        "steps = path.step_sizes",
        (LIKELIHOOD,),
    ),
    Mistake(
        "AIS: temperature missing in the weights",
        "evaluation",
        "(1 - beta) * g0 + beta / t * g1, e1 / t - e0",
        "(1 - beta) * g0 + beta / t * g1, e1 - e0",
        (LIKELIHOOD,),
    ),
    Mistake(
        "AIS: temperature missing in the moves",
        "evaluation",
        "(1 - self.beta) * self.base.energy(x) + self.beta / self.temperature * self.energy(x)",
        "(1 - self.beta) * self.base.energy(x) + self.beta * self.energy(x)",
        (LIKELIHOOD,),
    ),
    Mistake(
        "AIS: sign of the reverse estimate",
        "evaluation",
        "back, back_error = log_z0 - reverse.log_mean.item()",
        "back, back_error = log_z0 + reverse.log_mean.item()",
        (LIKELIHOOD,),
    ),
    Mistake(
        "AIS: log Z of the base forgotten",
        "evaluation",
        "log_z = log_z0 + forward.log_mean.item()",
        "log_z = forward.log_mean.item()",
        (LIKELIHOOD,),
    ),
    Mistake(
        "AIS: mean of the log-weights instead of the log of their mean",
        "evaluation",
        "return torch.logsumexp(log_weights, -1) - math.log(log_weights.shape[-1])",
        "return log_weights.mean(-1)",
        (LIKELIHOOD,),
    ),
    Mistake(
        "AIS: standard error of one weight, not of their mean",
        "evaluation",
        "((n / ess - 1).clamp(min=0) / (n - 1)).sqrt()",
        "(n / ess - 1).clamp(min=0).sqrt()",
        (LIKELIHOOD,),
    ),
    Mistake(
        "AIS: too few weights that count are not refused",
        "evaluation",
        "    if not summary.ess >= needed:",
        "    if summary.ess < 1:",
        (LIKELIHOOD,),
    ),
    Mistake(
        "AIS: a bracket that is open the other way is not refused",
        "evaluation",
        "    if abs(gap) > 4 * error:",
        "    if gap > 4 * error:",
        (LIKELIHOOD,),
    ),
    Mistake(
        "log-likelihood without the temperature",
        "evaluation",
        "log_density(energy, part, partition.log_z, partition.temperature)",
        "log_density(energy, part, partition.log_z)",
        (LIKELIHOOD,),
    ),
    Mistake(
        "bits per dimension without the width of a bin",
        "evaluation",
        "return -(log_likelihood / n_dims + math.log(bin_width)) / math.log(2)",
        "return -(log_likelihood / n_dims) / math.log(2)",
        (LIKELIHOOD,),
    ),
    Mistake(
        "bits per dimension in nats",
        "evaluation",
        "return -(log_likelihood / n_dims + math.log(bin_width)) / math.log(2)",
        "return -(log_likelihood / n_dims + math.log(bin_width))",
        (LIKELIHOOD,),
    ),
    Mistake(
        "dequantisation puts every pixel into the middle of its bin",
        "evaluation",
        "return ((k.round() + noise) * (2 / levels) - 1).clamp(-1, 1)",
        "return ((k.round() + 0.5) * (2 / levels) - 1).clamp(-1, 1)",
        (LIKELIHOOD,),
    ),
    # --- evaluation: sample quality -------------------------------------------------------------------------------
    Mistake(
        "Fréchet distance without the covariances",
        "evaluation",
        "return max(0.0, float(gap + a.square().sum() + b.square().sum() - 2 * shared))",
        "return max(0.0, float(gap))",
        (QUALITY,),
    ),
    Mistake(
        "kernel distance biased: the diagonal is included",
        "evaluation",
        "        kernel[torch.arange(len(rows)), rows] = 0.0  #",
        "        #",
        (QUALITY,),
    ),
    Mistake(
        "p-value of the permutation test without the + 1",
        "evaluation",
        "float((values >= values[0] - slack).double().mean())",
        "float((values[1:] >= values[0] - slack).double().mean())",
        (QUALITY,),
    ),
    Mistake(
        "precision and recall swapped",
        "evaluation",
        "PrecisionRecall(_share_inside(x, y, k), _share_inside(y, x, k))",
        "PrecisionRecall(_share_inside(y, x, k), _share_inside(x, y, k))",
        (QUALITY,),
    ),
    Mistake(
        "an example counts as its own neighbour",
        "evaluation",
        "nearest_distance(manifold, manifold, k + 1)",
        "nearest_distance(manifold, manifold, k)",
        (QUALITY,),
    ),
    Mistake(
        "AUROC of the wrong sign",
        "evaluation",
        "torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))])",
        "torch.cat([torch.ones(len(inside)), torch.zeros(len(outside))])",
        (QUALITY,),
    ),
    # --- data -----------------------------------------------------------------------------------------------------
    Mistake(
        "images scaled to [0, 1]",
        "data",
        "x.float() / 127.5 - 1 if x.dtype == torch.uint8",
        "x.float() / 255 if x.dtype == torch.uint8",
        (DATA,),
    ),
    Mistake(
        "16-bit greys cut off instead of scaled",
        "data",
        "(np.asarray(image) // 257).astype(np.uint8)",
        "np.asarray(image).astype(np.uint8)",
        (DATA, HOSTILE),
    ),
    Mistake(
        "transparency laid on black",
        "data",
        'Image.new("RGBA", image.size, "white")',
        'Image.new("RGBA", image.size, "black")',
        (DATA,),
    ),
    Mistake(
        "decompression bombs are only warned of",
        "data",
        '            warnings.simplefilter("error", Image.DecompressionBombWarning)  #',
        "            #",
        (HOSTILE,),
    ),
    Mistake(
        "mixture density without its normaliser",
        "data",
        "return torch.logsumexp(exponents, 1) - math.log(len(centres) * 2 * math.pi * std**2)",
        "return torch.logsumexp(exponents, 1)",
        (DATA,),
    ),
)
