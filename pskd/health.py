"""Whether a run is alive, from its status.json alone: for the health checks of containers."""

import json
import time
from pathlib import Path

from pskd.errors import PskdError

# Above the default of run.timeout_s: what lives and waits longer than that has ended itself.
STALE_S = 900.0


def check(run: Path, stale_s: float) -> str:
    """What the run is doing. Nothing begun, stopped and complete are well, as is a fresh heartbeat.

    stale_s: how old a heartbeat may be, in seconds.

    Raises:
        PskdError: the run failed, says nothing for longer than that, or its status is unreadable.
    """
    path = run / "status.json"
    try:
        status = json.loads(path.read_text())
        state, reason = status["state"], status.get("reason")
        age_s = time.time() - status["heartbeat"]
    except FileNotFoundError:
        return f"{run}: no run has begun"
    except OSError as error:
        raise PskdError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise PskdError(f"{path} is damaged ({error!r}). Start the run again.") from error
    match state:
        case "stopped" | "complete":
            return f"{run}: {state}"
        case "running" if age_s <= stale_s:
            return f"{run}: running, last heartbeat {age_s:.0f} s ago"
        case "running":
            raise PskdError(
                f"{run} says that it is running, but its last heartbeat was {age_s:.0f} s ago, "
                f"more than {stale_s:g} s. It was killed or hangs: start it again to resume."
            )
    raise PskdError(f"{run}: {state}: {reason}")
