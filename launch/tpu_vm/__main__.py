"""Starts jaxlm on Cloud TPU VMs: a queued resource, the command on all its workers, and again.

Asks for the slices as one queued resource, waits until they are there, runs --setup once on every
worker, then the command on all of them. When a slice is preempted it is given back and asked for
anew; when the command ends otherwise than by itself it is started again, up to --restarts times;
but not where the user has something to mend (exit code 1 or 2). JAX finds the workers by the
metadata of the VMs. Ctrl-C sends SIGTERM to the workers, which save and end. The resource stays
unless --delete is given: the last line says how to give it back, where there is one.
"""

import concurrent.futures
import re
import subprocess
import sys
import time

from launch import options, tpus

GONE = ("FAILED", "SUSPENDING", "SUSPENDED", "DELETING")  # states that lead nowhere
ENDED = "launch: ended with code "
TRIES = 5  # of a question to gcloud, before its error is told
# What gcloud says where asking again mends nothing: nobody is logged in, no project, a wrong word.
FOR_GOOD = re.compile(
    "Failed to find attribute|required property|active account|gcloud auth login|"
    "[Rr]eauthentication|PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ARGUMENT|"
    "[Ii]nvalid choice|unrecognized arguments"
)
UNKNOWN = 255  # no worker said how it ended: the connection broke


def parser() -> options.Parser:
    p = options.Parser("launch.tpu_vm", __doc__ or "")
    number = options.at_least
    p.add_argument("--topology", type=tpus.argument, help="of a slice, such as v5e:16x16")
    p.add_argument("--slices", type=number(1), default=1, help="(1)")
    p.add_argument("--zone", help="such as us-west4-a")
    p.add_argument("--project", help="default: gcloud's")
    p.add_argument("--runtime", help="software version of the VMs; default: by the kind of TPU")
    p.add_argument("--spot", action="store_true", help="may be preempted at any time")
    p.add_argument("--reserved", action="store_true", help="from a reservation")
    p.add_argument("--setup", default="", help="shell command for each new worker")
    p.add_argument("--folder", default=".", help="to start in on the workers (home)")
    p.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="(repeat)")
    p.add_argument("--restarts", type=number(0), default=100, help="at most (100)")
    p.add_argument("--poll", type=number(1), default=30, help="seconds between questions (30)")
    p.add_argument("--delete", action="store_true", help="give the slices back at the end")
    return p


class Slices:
    """The calls of gcloud that this launcher makes, as lists of words."""

    def __init__(self, o):
        self.o = o
        several = o.slices > 1
        self.nodes = [f"{o.name}-{i}" for i in range(o.slices)] if several else [o.name]
        self.where = [f"--zone={o.zone}"] + ([f"--project={o.project}"] if o.project else [])
        self.held = False  # whether there may be something to give back

    def _queued(self, verb, *more):
        words = ["gcloud", "compute", "tpus", "queued-resources", verb, self.o.name]
        return [*words, *more, *self.where]

    def create(self) -> list[str]:
        o = self.o
        more = [f"--node-count={o.slices}", f"--node-prefix={o.name}"]
        return self._queued(
            "create",
            *(more if o.slices > 1 else [f"--node-id={o.name}"]),
            f"--accelerator-type={o.topology.type}",
            f"--runtime-version={o.runtime or o.topology.kind.runtime}",
            *(["--spot"] if o.spot else []),
            *(["--reserved"] if o.reserved else []),
        )

    def state(self) -> list[str]:
        return self._queued("describe", "--format=value(state.state)")

    def delete(self) -> list[str]:
        return self._queued("delete", "--force", "--quiet")

    def ssh(self, node: str, script: str) -> list[str]:
        words = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", node, "--worker=all"]
        return [*words, f"--command={script}", *self.where]


def remote(p: options.Parser, o, command: list[str], restarts: int = 0) -> str:
    """What runs on each worker: the command, after an earlier one that a broken line left."""
    told = {"JAXLM_RESTARTS": str(restarts)} if restarts else {}  # that get no further, jaxlm ends
    env = "".join(
        f"export {n}={options.line([v])}; "
        for n, v in (told | options.environment(p, o.env)).items()
    )
    return (
        f"{stop(o)}; cd {_folder(o)} || exit 2; {env}{options.line(command)} & "
        f'echo $! > {_pid(o)}; wait $!; code=$?; rm -f {_pid(o)}; echo "{ENDED}$code"; exit $code'
    )


def stop(o) -> str:
    """Ends the command on a worker, if it runs there, and waits for its end."""
    return (
        f'if read -r pid < {_pid(o)} && kill -TERM "$pid"; then '
        'while kill -0 "$pid"; do sleep 1; done; fi 2>/dev/null'
    )


def _pid(o):
    return f"/tmp/launch-{o.name}.pid"


def _folder(o):
    return options.line([o.folder])


def run(p: options.Parser, o, command: list[str], slices: Slices) -> int:
    """The life of the job; returns its exit code."""
    fresh, starts, here = True, 0, 0  # here: on these slices, whose loss is nobody's fault
    while True:
        state = _ask(slices.state(), o.poll)
        if state in GONE:
            _say(f"the slices are {state}: given back and asked for anew")
            _call(slices.delete(), check=True)
            state = ""
        slices.held = True
        if not state:
            _create(slices, o.poll)
            fresh = True
        _wait(slices, o.poll)
        if fresh and o.setup and (code := _everywhere(slices, o.setup, marked=False)):
            _say(f"the setup failed with code {code}")
            if _ask(slices.state(), o.poll) == "ACTIVE":
                return code
            continue
        here = 1 if fresh else here + 1
        fresh = False
        starts += 1
        _say(f"start {starts}")
        code = _everywhere(slices, remote(p, o, command, here - 1))
        if code == 0 or code in options.MEND or starts > o.restarts:
            ended = "finished" if code == 0 else f"ended with code {code}"
            _say(f"{ended} after {starts} start{'s' if starts > 1 else ''}")
            return code
        _say(f"ended with code {code}: starts again")


def _create(slices, seconds):
    if subprocess.run(slices.create()).returncode:
        slices.held = bool(_ask(slices.state(), seconds))
        raise SystemExit(f"launch: this failed: {options.line(slices.create())}")


def _wait(slices, seconds):
    """Until the slices are there, or cannot come."""
    before = ""
    while (state := _ask(slices.state(), seconds)) != "ACTIVE" and state not in GONE:
        if state != before:
            _say(f"waiting for the slices, which are {state}")
        before = state
        time.sleep(seconds)


def _everywhere(slices, script, marked=True):
    """Runs a script on all workers of all slices at once; returns the code that decides."""
    with concurrent.futures.ThreadPoolExecutor(len(slices.nodes)) as pool:
        found = list(pool.map(lambda n: _watch(slices.ssh(n, script), marked), slices.nodes))
    codes = [code for codes in found for code in codes]
    # One lost or crashed worker makes the others end too; then the start is worth repeating.
    return max(codes)


def _watch(call, marked):
    """Passes the output on; returns the codes that the workers of one slice ended with."""
    codes = []
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        for line in job.stdout or ():
            if found := re.search(re.escape(ENDED) + r"(\d+)", line):
                codes.append(int(found.group(1)))
            else:
                print(line, end="", flush=True)
    if marked:
        return codes or [UNKNOWN]
    return [job.returncode]


def _ask(call, seconds):
    """The state that gcloud prints; "" where there is no such resource.

    A network may be down for a moment; what another try does not mend is told at once, and all of
    it: gcloud's last line is often but half a sentence.
    """
    said = ""
    for left in reversed(range(TRIES)):
        done = subprocess.run(call, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
        said = done.stderr.strip() or f"code {done.returncode}"
        if "NOT_FOUND" in said:
            return ""
        if FOR_GOOD.search(said):
            remedy = "\nlaunch: --project=NAME of this launcher names one" * ("[project]" in said)
            raise SystemExit(f"launch: this failed: {options.line(call)}\n{said}{remedy}")
        if left:
            _say(f"gcloud failed, {left} more tries: {' '.join(said.split())[:300]}")
            time.sleep(seconds)
    raise SystemExit(f"launch: this failed {TRIES} times: {options.line(call)}\n{said}")


def _call(call, check):
    if subprocess.run(call).returncode and check:
        raise SystemExit(f"launch: this failed: {options.line(call)}")


def _say(text):
    print(f"launch: {text}", flush=True)


def main(argv: list[str]) -> int:
    p = parser()
    o, command = p.split(argv)
    for name in ("topology", "zone"):
        if not getattr(o, name):
            p.error(f"--{name} is missing")
    if o.spot and o.reserved:
        p.error("give one of --spot and --reserved")
    options.require_shared_workdir(p, command, o.slices * o.topology.hosts)
    slices = Slices(o)
    if o.dry_run:
        print("# would run, in this order:")
        for call in (slices.create(), slices.state()):
            print(options.line(call))
        for script in filter(None, (o.setup, remote(p, o, command))):
            for node in slices.nodes:
                print(options.line(slices.ssh(node, script)))
        if o.delete:
            print(options.line(slices.delete()))
        return 0
    try:
        return run(p, o, command, slices)
    except FileNotFoundError:
        p.error("there is no gcloud here: install it, or look with --dry_run")
    except KeyboardInterrupt:
        if slices.held:
            _say("Ctrl-C: asking the workers to save and end")
            _everywhere(slices, stop(o), marked=False)
        return 130
    finally:
        if slices.held and o.delete:
            _call(slices.delete(), check=False)
        elif slices.held:
            _say(f"to give the slices back: {options.line(slices.delete())}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
