"""What this rank computes on, tried out: a product, an image through DALI, a sum over all ranks."""

import re
import time
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from pskd import launch, world
from pskd.config import Config
from pskd.data.catalog import FOLDER
from pskd.doctor.page import OK, WARNING, WRONG, Line
from pskd.doctor.software import dali_version
from pskd.errors import PskdError
from pskd.words import readable_bytes
from pskd.world import World

_SIDE = 256
_VALUES = 1 << 18  # 1 MB of float32
_INSTALL_DALI = "Install it: pip install pskd[cu13], or pskd[cu12] for CUDA 12."


def device(place: launch.Launch) -> tuple[Line, torch.device | None]:
    """The device that training would choose for this rank, after a product on it."""
    gpus = torch.cuda.device_count()
    try:
        chosen = world.choose_device(place.local_rank, place.local_world_size, gpus)
    except PskdError as error:
        return Line("device", WRONG, str(error)), None
    if chosen.type == "cpu":
        model = torch.backends.cpu.get_cpu_capability()
        return Line("device", OK, f"no GPU: it trains on the CPU ({model})", alike=True), chosen
    facts = torch.cuda.get_device_properties(chosen)
    text = (
        f"{facts.name}, {readable_bytes(facts.total_memory)}, one of {gpus}; "
        f"driver {_driver()}, CUDA {torch.version.cuda}"
    )
    try:
        torch.cuda.set_device(chosen)
        ones = torch.ones(_SIDE, _SIDE, device=chosen)
        right = bool((ones @ ones == _SIDE).all())
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        remedy = "Update the driver, or install a torch that is built for this GPU."
        return Line("device", WRONG, f"{text}: {reason}", remedy, alike=True), None
    if not right:
        remedy = "Take this GPU out of use (CUDA_VISIBLE_DEVICES)."
        return Line("device", WRONG, f"{text}: a product is wrong", remedy, alike=True), None
    return Line("device", OK, text, alike=True), chosen


def dali(config: Config, on: torch.device) -> Line:
    """An image through the graph that folders of images go through."""
    needed = config.data.name == FOLDER
    use = "" if needed else "; only folders of images need it"
    failed = WRONG if needed else OK
    version = dali_version()
    if version is None:
        remedy = _INSTALL_DALI if needed else ""
        return Line("DALI", failed, f"not installed{use}", remedy, alike=True)
    try:
        _decode_one(config, on)
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        return Line(
            "DALI",
            WRONG if needed else WARNING,
            f"{version} does not decode an image on {on.type}{use}: {reason}",
            _INSTALL_DALI if on.type == "cpu" else "Use data.decoder cpu, or update the driver.",
            alike=True,
        )
    return Line("DALI", OK, f"{version}, decodes on {on.type}{use}", alike=True)


def sum_over_ranks(here: World, on: torch.device) -> Line:
    """Collective: an all-reduce by what gradients travel by."""
    backend = "nccl" if on.type == "cuda" else "gloo"
    values = torch.ones(_VALUES, device=on)
    try:
        group = dist.new_group(backend=backend, timeout=here.timeout)
        assert isinstance(group, dist.ProcessGroup)
        dist.all_reduce(values, group=group)  # connects
        start = time.perf_counter()
        dist.all_reduce(values, group=group)
        right = bool((values == here.size**2).all())
        took_ms = 1e3 * (time.perf_counter() - start)
    except RuntimeError as error:
        return Line(
            "all-reduce",
            WRONG,
            f"{backend} fails: {str(error).splitlines()[0]}",
            "Let the nodes reach each other on all ports; NCCL_SOCKET_IFNAME and "
            "GLOO_SOCKET_IFNAME choose the interface, NCCL_DEBUG=INFO tells more.",
        )
    if not right:
        remedy = "Look for faulty links or memory; NCCL_DEBUG=INFO tells more."
        return Line("all-reduce", WRONG, f"{backend}: the sum is wrong", remedy)
    size = readable_bytes(values.nbytes)
    return Line("all-reduce", OK, f"{backend}, {size} over {here.size} ranks: {took_ms:.1f} ms")


def _decode_one(config: Config, on: torch.device) -> None:
    from pskd.data.dali import GREY  # noqa: PLC0415  (DALI is optional)
    from pskd.data.graph import ImageOptions, Rows, make_pipeline  # noqa: PLC0415

    options = ImageOptions(
        replace(config.data, augment="standard", prefetch=1),
        mixed=on.type == "cuda" and config.data.decoder != "cpu",
        threads=1,
        channels_last=False,
    )
    rows = Rows(
        [GREY],
        np.array([[0, 0, 8, 8]], np.int32),
        np.zeros((1, 2), np.float32),
        np.zeros(1, np.int32),
        np.full((1, 2), 8, np.float32),
        np.zeros((1, 3, 7), np.float32),
        np.zeros(1, np.int64),
    )
    pipeline = make_pipeline(
        lambda: rows.feed(whole=False),
        options,
        1,
        device_id=on.index if on.type == "cuda" else None,
        largest=(8, 8),
        whole=False,
    )
    pipeline.build()
    pipeline.run()


def _driver() -> str:
    driver = world.DRIVER
    found = re.search(r"\d+\.\d+(\.\d+)?", driver.read_text()) if driver.exists() else None
    return found[0] if found else "unknown"
