import csv
import itertools

import numpy as np
import pytest
import torch

from lsgm.config import ScheduleConfig
from lsgm.data.batches import Batches
from lsgm.errors import LSGMError
from lsgm.training.engine import History, Optimised, Schedule, fit

IMAGES = np.zeros((64, 1, 28, 28), np.uint8)


def schedule(**settings):
    return Schedule(ScheduleConfig(**{"epochs": 2, "batch": 8, "warmup_epochs": 0.5} | settings), 8)


def test_iteration_schedule_warms_up_and_ends_at_the_minimum():
    s = schedule(lr_schedule="iteration")
    rates = [s.learning_rate(i, 1.0, 0.1) for i in range(s.steps)]
    assert s.steps == 16 and rates[:4] == [0.0, 0.25, 0.5, 0.75]
    assert rates[4] == 0.75 and rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))


def test_no_warm_up_starts_at_the_full_rate():
    assert schedule(warmup_epochs=0).learning_rate(0, 1.0, 0.1) == 1.0


def test_fit_runs_every_step_and_records_means(tmp_path):
    s = schedule()
    p = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([p], lr=1.0)
    history, seen = History(every=4), []

    def update(x, step, steps):
        seen.append((step, steps, tuple(x.shape), optimiser.param_groups[0]["lr"]))
        return {"loss": torch.tensor(float(step)), "nelbo": torch.tensor(1.0)}

    batches = Batches(IMAGES, 8, torch.device("cpu"), seed=1)
    summary = fit("test", batches, s, [Optimised("vae", optimiser, 1.0, 0.1)], update, history)
    assert [item[0] for item in seen] == list(range(16)) and summary.steps == 16
    assert seen[0][1:3] == (16, (8, 1, 32, 32))
    assert [item[3] for item in seen] == [s.learning_rate(i, 1.0, 0.1) for i in range(16)]
    history.write(tmp_path / "history.csv")
    rows = list(csv.DictReader((tmp_path / "history.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == [4, 8, 12, 16]
    assert [float(row["loss"]) for row in rows] == [1.5, 5.5, 9.5, 13.5]
    assert float(rows[-1]["epoch"]) == 2.0


def test_divergence_is_reported_with_the_term_and_the_way_out():
    def update(x, step, steps):
        value = torch.tensor(float("nan") if step == 5 else 1.0)
        return {"loss": value, "reconstruction": value, "nelbo": torch.tensor(1.0)}

    batches = Batches(IMAGES, 8, torch.device("cpu"), seed=1)
    with pytest.raises(LSGMError, match=r"before step 6 \(not finite: loss, reconstruction\).*learning rate"):
        fit("VAE", batches, schedule(), [], update, History(every=2))


def test_tensorboard_events_are_written(tmp_path):
    history = History(every=1, tensorboard=tmp_path)
    history.add({"loss": torch.tensor(2.0)})
    history.record(1, {"epoch": 0.5})
    history.write(tmp_path / "history.csv")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Scalars("loss")[0].value == 2.0
