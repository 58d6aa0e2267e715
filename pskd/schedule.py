"""The learning rate as a function of the position in training. PURE."""

import math

from pskd.config import ScheduleSection


def lr_at(
    schedule: ScheduleSection, peak: float, epochs: int, steps_per_epoch: int, step: int
) -> float:
    """Learning rate of global optimizer step `step` (0-based, counted over epochs).

    `step`: drops by gamma at each milestone, constant inside an epoch. `cosine`: half a cosine
    from the peak to 0 over the steps after the warm-up (Loshchilov and Hutter, 2017). The warm-up
    is linear: step k of K trains at (k + 1) / K of the peak.
    """
    warmup_steps = round(schedule.warmup_epochs * steps_per_epoch)
    if step < warmup_steps:
        return peak * ((step + 1) / warmup_steps)
    if schedule.name == "cosine":
        progress = (step - warmup_steps) / (epochs * steps_per_epoch - warmup_steps)
        return peak * (1 + math.cos(math.pi * progress)) / 2
    drops = sum(step // steps_per_epoch >= milestone for milestone in schedule.milestones)
    return float(peak * schedule.gamma**drops)
