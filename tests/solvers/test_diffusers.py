"""Reference values: the schedulers of Hugging Face's diffusers, for their own schedule and a closed-form prediction."""

import pytest
import torch
from diffusers import schedulers

from lsgm.noise_schedule import NoiseSchedule
from lsgm.solvers.adams_bashforth import adams_bashforth
from lsgm.solvers.exponential import exponential_multistep
from lsgm.solvers.runge_kutta import runge_kutta

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers

SHAPE = (5, 2, 3)
MEANS = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def prediction(z, m, sigma):
    """E[noise | z] for z = m z0 + sigma noise, where z0 is drawn from equal parts N(mean_k, 0.2 I)."""
    delta, total = z[:, None] - m * MEANS.to(z.dtype), 0.2 * m**2 + sigma**2
    share = (-0.5 * delta.square().sum((-2, -1), keepdim=True) / total).softmax(1)
    return sigma * (share * delta).sum(1) / total


def start(dtype):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def schedule_of(alpha_bar):
    """That of the squares of m, in the order of the steps; its times are their numbers."""
    alpha_bar = alpha_bar.double()
    return NoiseSchedule(torch.arange(len(alpha_bar)).double(), alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


def predict_on(schedule):
    def predict(z, t):
        return prediction(z, schedule.mean[int(t)].item(), schedule.sigma[int(t)].item())

    return predict


def run(scheduler, z, schedule, **settings):
    """The scheduler's own loop; ``settings`` of each step are lists."""
    predict = predict_on(schedule)
    for i, t in enumerate(scheduler.timesteps):
        each = {name: values[i] for name, values in settings.items()}
        z = scheduler.step(predict(z, i), t, z, **each).prev_sample
    return z


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize(
    ("order", "algorithm", "tau"),
    [(1, "dpmsolver++", 0.0), (2, "dpmsolver++", 0.0), (1, "sde-dpmsolver++", 1.0), (2, "sde-dpmsolver++", 1.0)],
)
def test_dpm_solver_multistep(order, algorithm, tau, steps, spacing):
    """DPM-Solver++(2M), in the variant that integrates the exponential exactly (`heun`), and the same as SDE.

    It computes in float32. At sigma = 0 it ends with the prediction of z0, as `denoise` does.
    """
    noise = [start(torch.float32).roll(1 + i, 0) for i in range(steps)]
    for final in ("sigma_min", "zero"):
        scheduler = schedulers.DPMSolverMultistepScheduler(
            solver_order=order, solver_type="heun", algorithm_type=algorithm, lower_order_final=False,
            final_sigmas_type=final, timestep_spacing=spacing,
        )  # fmt: skip
        scheduler.set_timesteps(steps)
        schedule = schedule_of(1 / (1 + scheduler.sigmas.double() ** 2))
        z = start(torch.float32)
        settings = {"variance_noise": noise} if tau else {}
        theirs = run(scheduler, z, schedule, **settings)
        draws, predict = iter(noise), predict_on(schedule)
        if final == "sigma_min":
            ours = exponential_multistep(predict, z, schedule, order, tau=tau, draw=lambda draws=draws: next(draws))
        else:
            before = NoiseSchedule(schedule.t[:-1], schedule.mean[:-1], schedule.sigma[:-1])
            ours = exponential_multistep(predict, z, before, order, tau=tau, draw=lambda draws=draws: next(draws))
            ours = (ours - before.sigma[-1].item() * predict(ours, steps - 1)) / before.mean[-1].item()
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("steps", [4, 25])
def test_ddim(steps):
    """In float64: the data form of order 1, which is also the noise form of order 1."""
    scheduler = schedulers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(steps)
    times = torch.cat([scheduler.timesteps, torch.zeros(1, dtype=torch.int64)])
    schedule = schedule_of(scheduler.alphas_cumprod[times])
    z, predict = start(torch.float64), predict_on(schedule)
    theirs = run(scheduler, z, schedule)
    torch.testing.assert_close(exponential_multistep(predict, z, schedule, 1), theirs, rtol=1e-10, atol=1e-12)
    m = schedule.mean.tolist()
    ours = m[-1] * adams_bashforth(lambda i, y: predict(m[i] * y, i), z / m[0], schedule.noise_level.tolist(), order=1)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_noise_form(name):
    """EDM's Euler and Heun methods: y = z / m in the noise level; the last step, to 0, is the prediction of z0."""
    steps = 12
    scheduler = getattr(schedulers, name)(use_karras_sigmas=True)
    scheduler.set_timesteps(steps)
    levels = scheduler.sigmas.double().unique().flip(0)
    assert len(levels) == steps + 1 and levels[-1] == 0
    y = start(torch.float32) * levels[0].item()

    def slope(level, y):
        m = (1 + level**2) ** -0.5
        return prediction(m * y, m, m * level)

    theirs = y
    for i, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(slope(scheduler.sigmas[i].item(), theirs), t, theirs).prev_sample
    x = levels[:-1].tolist()
    ours = runge_kutta(lambda i, y: slope(x[i], y), y, x, "euler" if "Euler" in name else "heun")
    ours = ours - x[-1] * slope(x[-1], ours)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
