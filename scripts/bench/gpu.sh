#!/usr/bin/env bash
# All that waits for a machine with a GPU: the tests that need one, and every benchmark.
#
#   scripts/bench/gpu.sh RESULT.json
#
# About an hour. What fails is noted in the file, with its output, and the rest goes on; the exit code
# is 1 then. PSKD_BIN names another environment's bin than .venv/bin.
set -uo pipefail
cd "$(dirname "$0")/../.."
[ $# -eq 1 ] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 2; }
python=${PSKD_BIN:-.venv/bin}/python
command -v nvidia-smi >/dev/null || { echo "error: there is no nvidia-smi: this needs an NVIDIA GPU" >&2; exit 2; }
export PYTHONPATH=$PWD
exec "$python" - "$1" <<'PYTHON'
import json, pathlib, shlex, subprocess, sys, time
import torch
gpus = torch.cuda.device_count()
step = "scripts/bench/step.py --rounds 20 --steps 50"
fast = "--engine.channels_last=true --optimizer.implementation=fused"
commands = {
    "tests": "-m pytest -m gpu -q",
    "step, fp32": f'{step} --processes {"1" if gpus < 2 else f"1 {gpus}"}'
    f' --variant "any kernel=--engine.deterministic=false" --variant "TF32=--engine.tf32=true"'
    f' --variant "fused={fast}"',
    "step, bf16": f'{step} --precision bf16 --processes {"1" if gpus < 2 else f"1 {gpus}"}'
    f' --variant "any kernel=--engine.deterministic=false" --variant "fused={fast}"'
    f' --variant "compiled={fast} --engine.compile=true"',
    "step, all methods": f"{step} --processes 1 --classes 1000 --methods baseline cskd tfkd_reg tfkd_self pskd",
    "outside steps": f"scripts/bench/outside_steps.py --processes {max(1, gpus)}",
    "store": "scripts/bench/store.py --full",
    "memory": "scripts/bench/memory.py",
    "images": "scripts/bench/data.py",
    "measures": "scripts/bench/metrics.py",
    "scale": "scripts/bench/scale.py",
}
result = {
    "gpus": [torch.cuda.get_device_name(n) for n in range(gpus)],
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "nvidia-smi": subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout,
    "runs": {},
}
out, failed = pathlib.Path(sys.argv[1]), []
for name, command in commands.items():
    print(f"{name}: {command}", flush=True)
    started = time.time()
    done = subprocess.run([sys.executable, *shlex.split(command)], capture_output=True, text=True)
    print(done.stdout, flush=True)
    if done.returncode:
        failed.append(name)
        print(f"failed with {done.returncode}:\n{done.stderr[-2000:]}", flush=True)
    result["runs"][name] = {
        "command": command,
        "exit": done.returncode,
        "seconds": round(time.time() - started, 1),
        "output": done.stdout,
        "errors": done.stderr[-20000:] if done.returncode else "",
    }
    out.write_text(json.dumps(result, indent=1))  # what is known, if it is interrupted
print(f"written: {out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
sys.exit(bool(failed))
PYTHON
