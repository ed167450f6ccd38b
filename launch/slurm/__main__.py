"""Starts jaxlm under SLURM: one batch job, one process per GPU or per node by srun.

JAX finds the coordinator, the number of processes and the place of each in what SLURM sets. All
tasks of a node see all of its GPUs (no --gpus-per-task): JAX gives each its own by its local index.

The job starts again by itself (scontrol requeue) when a process was lost or crashed, when it was
preempted, and when its time is over: GRACE seconds before that SLURM sends SIGTERM, and jaxlm saves
and ends. It does not where the user has something to mend (exit code 1 or 2).
"""

import os
import subprocess
import sys

from launch import options

TEMPLATE = """\
#!/bin/bash
{directives}

set -u
cd {folder} || exit 2
export JAXLM_RESTARTS="${{SLURM_RESTART_COUNT:-0}}"
{environment}
# No --kill-on-bad-exit and no --wait: when one process ends early, the others still save or end
# by themselves, and a task killed meanwhile would lose what it writes.
srun --kill-on-bad-exit=0 --wait=0{srun} \\
  {command}
code=$?

restarts=$JAXLM_RESTARTS
case "$code" in
  0) exit 0 ;;
  1 | 2) echo "launch: ended with code $code: to be mended, so not started again" ;;
  *)
    if [ "$restarts" -lt {restarts} ] && scontrol requeue "$SLURM_JOB_ID"; then
      echo "launch: ended with code $code: start $((restarts + 2)) follows"
    else
      echo "launch: ended with code $code after $((restarts + 1)) starts: not started again"
    fi
    ;;
esac
exit "$code"
"""

TIME = r"\d+|\d+:\d+(:\d+)?|\d+-\d+(:\d+){0,2}"


def parser() -> options.Parser:
    p = options.Parser("launch.slurm", __doc__ or "")
    number = options.at_least
    p.add_argument("--nodes", type=number(1), default=1, help="number of nodes (1)")
    p.add_argument("--gpus_per_node", type=number(0), default=8, help="0 for CPU nodes (8)")
    p.add_argument("--process", choices=("gpu", "node"), default="gpu", help="one per ... (gpu)")
    p.add_argument("--cpus_per_process", type=number(1), help="cores for each; default: SLURM's")
    p.add_argument("--time", type=options.matching(TIME, "24:00:00"), help="limit of one start")
    p.add_argument("--partition", help="partition of the cluster")
    p.add_argument("--account", help="account to charge")
    p.add_argument("--grace", type=number(1), default=300, help="seconds to save in (300)")
    p.add_argument("--restarts", type=number(0), default=100, help="at most (100)")
    p.add_argument("--folder", default="", help="to start in, seen by all nodes (here)")
    p.add_argument("--log", default="%x-%j.log", help="file of the output (%%x-%%j.log)")
    p.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="(repeat)")
    p.add_argument("--sbatch", action="append", default=[], metavar="--OPTION", help="(repeat)")
    p.add_argument("--srun", action="append", default=[], metavar="--OPTION", help="(repeat)")
    return p


def script(p: options.Parser, o, command: list[str]) -> str:
    """The batch script."""
    if o.process == "gpu" and not o.gpus_per_node:
        p.error("--process=gpu needs --gpus_per_node of at least 1; for CPU nodes --process=node")
    for name in ("sbatch", "srun"):
        for extra in getattr(o, name):
            if not extra.startswith("-") or "\n" in extra:
                p.error(f"--{name}={extra} should be an option of {name}, as --{name}=--qos=high")
    for name in ("partition", "account", "log"):
        if any(c.isspace() for c in getattr(o, name) or ""):
            p.error(f"--{name}={getattr(o, name)!r} may hold no spaces")
    directives = {
        "job-name": o.name,
        "nodes": o.nodes,
        "ntasks-per-node": o.gpus_per_node if o.process == "gpu" else 1,
        "cpus-per-task": o.cpus_per_process,
        "gpus-per-node": o.gpus_per_node or None,
        "time": o.time,
        "partition": o.partition,
        "account": o.account,
        "signal": f"TERM@{o.grace}",
        "output": o.log,
        "open-mode": "append",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in directives.items() if value is not None]
    lines += ["#SBATCH --requeue", *(f"#SBATCH {extra}" for extra in o.sbatch)]
    env = options.environment(p, o.env)
    # Since 22.05 srun does not take this one over from the batch script.
    cpus = [f"--cpus-per-task={o.cpus_per_process}"] if o.cpus_per_process else []
    return TEMPLATE.format(
        directives="\n".join(lines),
        folder=options.line([os.path.abspath(o.folder)]) if o.folder else '"$SLURM_SUBMIT_DIR"',
        environment="".join(f"export {n}={options.line([v])}\n" for n, v in env.items()),
        srun="".join(f" {options.line([extra])}" for extra in cpus + o.srun),
        command=options.line(command),
        restarts=o.restarts,
    )


def main(argv: list[str]) -> int:
    p = parser()
    o, command = p.split(argv)
    text = script(p, o, command)
    if o.dry_run:
        print(text, end="")  # and nothing else: it may be kept, changed, and given to sbatch
        return 0
    try:
        return subprocess.run(["sbatch"], input=text, text=True).returncode
    except FileNotFoundError:
        p.error("there is no sbatch here: run it on a login node, or with --dry_run")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
