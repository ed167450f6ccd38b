"""Launchers: bad options in a sentence, dry runs without effect, and what they submit held against
the real thing where it is installed: bash, shellcheck, SLURM, the Kubernetes and JobSet models,
XPK's and gcloud's parsers.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from launch import tpus
from launch import yaml as launch_yaml
from launch.gke import __main__ as gke
from launch.slurm import __main__ as slurm
from launch.tpu_vm import __main__ as tpu_vm

ROOT = Path(__file__).parents[1]
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
README = (ROOT / "launch" / "README.md").read_text()
COMMAND = [
    *("python", "-m", "jaxlm.train", "--config=configs/a b.py", "--config.name=it's $HOME"),
    "--config.workdir=/runs/a",
]
VOLUME = "--volume=claim:/runs"
TPU = ["--topology=v5e:16x16", "--image=repo/jaxlm:1"]
GPU = ["--gpu=nvidia-h100-80gb", "--nodes=4", "--image=repo/jaxlm:1"]
VM = ["--topology=v5e:4x4", "--zone=us-west4-a"]


def dry(module, options, capsys, command=COMMAND):
    assert module.main(["--dry_run", *options, "--", *command]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "options", "says"),
    [
        (slurm, ["--nodes=0", "--", "x"], "'0' must be a whole number, at least 1"),
        (slurm, ["--nodes=2"], "no command: put -- and then the jaxlm command"),
        (slurm, ["--node=2", "--", "x"], "unrecognized arguments: --node=2"),
        (slurm, ["--name=A b", "--", "x"], "lower-case letters, digits and dashes"),
        (slurm, ["--time=soon", "--", "x"], "'soon' should look like 24:00:00"),
        (slurm, ["--gpus_per_node=0", "--", "x"], "for CPU nodes --process=node"),
        (slurm, ["--env=A", "--", "x"], "--env=NAME=VALUE"),
        (slurm, ["--sbatch=high", "--", "x"], "should be an option of sbatch"),
        (gke, ["--topology=v5e:16x16", "--", "x"], "--image is missing"),
        (gke, [*TPU, *GPU, "--", "x"], "give one of --topology=v5e:16x16 (TPU) and --gpu="),
        (gke, ["--topology=v9:2x2", "--", "x"], "'v9:2x2' should be one of v4, v5e, v5p, v6e"),
        (gke, ["--topology=v5p:16x16", "--", "x"], "a topology of v5p looks like v5p:4x4x4"),
        (gke, ["--topology=v5e:2x3", "--", "x"], "6 chips, which do not fill machines of 4"),
        (gke, [*TPU, "--via=xpk", "--", "x"], "--via=xpk needs --cluster=NAME"),
        (gke, [*TPU, "--volume=claim", "--", "x"], "'claim' should look like CLAIM:/PATH"),
        (slurm, ["--dry-run", "--", "x"], "--dry-run; did you mean --dry_run?"),
        (gke, ["--dryrun", "--", "x"], "--dryrun; did you mean --dry_run?"),
        (tpu_vm, ["--qqqqq", "--", "x"], "--qqqqq; --help lists all there are"),
        (tpu_vm, ["--zone=a", "--", "x"], "--topology is missing"),
        (tpu_vm, [*VM, "--spot", "--reserved", "--", "x"], "one of --spot and --reserved"),
    ],
)
def test_a_wrong_option_is_one_sentence(module, options, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        module.main(options)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


TRAIN = ["--", "python", "-m", "jaxlm.train", "--config=a.py"]


@pytest.mark.parametrize(
    ("module", "options", "workdir", "says"),
    [
        (
            tpu_vm,
            VM,
            "",
            "4 hosts train into one work folder, and without --config.workdir it is a",
        ),
        (tpu_vm, VM, "=runs/a", "--config.workdir=runs/a is a folder of each one's own"),
        (tpu_vm, VM, "=~/runs/a", "each one's own"),
        (tpu_vm, VM, " runs/a", "--config.workdir=runs/a is"),
        (gke, [*TPU, "--via=xpk", "--cluster=c"], "=runs/a", "64 hosts train into one"),
        (gke, TPU, "=/runs/a", "lies in the pod, and goes with it: add --volume=CLAIM:/PATH"),
        (gke, [*TPU, VOLUME], "=/run/a", "--config.workdir=/runs/NAME"),
        (gke, [*TPU, VOLUME], "=/runs-of-others/a", "--config.workdir=/runs/NAME"),
        (gke, [*GPU, VOLUME], "", "(the recipe names one) lies in the pod"),
    ],
)
def test_hosts_that_would_each_train_into_their_own_folder_are_not_started(
    module, options, workdir, says, capsys
):
    named = f"--config.workdir{workdir}".split(" ") if workdir else []
    with pytest.raises(SystemExit) as stopped:
        module.main(["--dry_run", *options, *TRAIN, *named])
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert says in said.err
    assert not said.out


@pytest.mark.parametrize(
    ("module", "options", "words"),
    [
        (tpu_vm, ["--topology=v5e:2x2", "--zone=a"], TRAIN),  # one host
        (tpu_vm, VM, [*TRAIN, "--config.workdir=/mnt/a"]),
        (tpu_vm, VM, ["--", "python", "-m", "jaxlm.evaluate", "--checkpoint=runs/a"]),
        (gke, [*TPU, VOLUME], [*TRAIN, "--config.workdir", "/runs/a"]),
        (gke, [*TPU, VOLUME], [*TRAIN, "--config.workdir=/runs"]),
        (slurm, ["--nodes=2"], TRAIN),  # all nodes see the folder that it starts in
    ],
)
def test_one_folder_for_all_is_enough(module, options, words, capsys):
    assert module.main(["--dry_run", *options, *words]) == 0
    assert not capsys.readouterr().err


def test_one_pod_without_a_volume_is_warned_of(capsys):
    assert gke.main(["--dry_run", "--gpu=nvidia-l4", "--image=i", *TRAIN]) == 0
    assert "lies in the pod, and goes with it" in capsys.readouterr().err


@pytest.mark.parametrize("module", [slurm, gke, tpu_vm])
def test_without_the_scheduler_it_says_so(module, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    options = {slurm: [], gke: [*TPU, VOLUME], tpu_vm: VM}[module]
    with pytest.raises(SystemExit):
        module.main([*options, "--", *COMMAND])
    assert re.search(r"there is no (sbatch|kubectl|gcloud) here", capsys.readouterr().err)
    dry(module, options, capsys)  # needs nothing, calls nothing


@pytest.mark.parametrize("name", ["slurm", "gke", "tpu_vm"])
def test_help(name):
    command = [sys.executable, "-m", f"launch.{name}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"usage: python -m launch.{name} [OPTIONS] -- python -m jaxlm.train" in done.stdout


def test_what_the_documentation_says_of_pods_can_be_launched(capsys):
    text = (ROOT / "docs" / "pod.md").read_text()
    calls = re.findall(r"^python -m launch\.(\w+) ((?:.*\\\n)*.*)$", text, re.M)
    assert [name for name, _ in calls] == ["slurm", "gke", "tpu_vm"]
    for name, options in calls:
        {"slurm": slurm, "gke": gke, "tpu_vm": tpu_vm}[name].main(words(options))
        assert not capsys.readouterr().err


def test_the_readme_shows_what_dry_runs_print(capsys):
    launchers = {"slurm": slurm, "gke": gke, "tpu_vm": tpu_vm}
    blocks = re.findall(r"```console\n\$ python -m launch\.(\w+) (.*?)```", README, re.S)
    assert {name for name, _ in blocks} == set(launchers)
    for name, text in blocks:
        options, printed = re.fullmatch(r"((?:.*\\\n)*.*\n)([\s\S]*)", text).groups()
        launchers[name].main(words(options))
        assert capsys.readouterr().out == printed, options


def words(line):
    """As a shell splits them."""
    call = ["bash", "-c", f'printf "%s\\0" {line}']
    return subprocess.run(call, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]


# ---------------------------------------------------------------- SLURM


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder with programs that stand for SLURM's: they write down how they were called."""
    programs = tmp_path / "bin"
    programs.mkdir()
    call = 'printf "%s\\n" "$@" > "$FAKE/srun"; echo "restarts: $JAXLM_RESTARTS"; exit "$CODE"'
    put(programs / "srun", call)
    put(programs / "scontrol", 'printf "%s\\n" "$@" > "$FAKE/scontrol"')
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(tmp_path))
    monkeypatch.setenv("SLURM_SUBMIT_DIR", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    return tmp_path


def put(path, body):
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def test_the_command_reaches_srun_word_by_word(cluster, capsys, monkeypatch):
    monkeypatch.setenv("CODE", "0")
    script = dry(slurm, ["--env=A=b c", "--srun=--label", "--cpus_per_process=4"], capsys)
    subprocess.run(["bash"], input=script, text=True, check=True)
    said = (cluster / "srun").read_text().splitlines()
    assert said[-len(COMMAND) :] == COMMAND
    assert said[: -len(COMMAND)] == [
        *("--kill-on-bad-exit=0", "--wait=0", "--cpus-per-task=4", "--label")
    ]


@pytest.mark.parametrize(
    ("code", "count", "again"),
    [
        *((0, 0, False), (1, 0, False), (2, 0, False), (70, 0, True), (137, 1, True)),
        *((143, 2, True), (143, 3, False)),
    ],
)
def test_it_starts_again_but_for_what_must_be_mended(
    cluster, capsys, monkeypatch, code, count, again
):
    monkeypatch.setenv("CODE", str(code))
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(count))
    script = dry(slurm, ["--restarts=3"], capsys)
    done = subprocess.run(["bash"], input=script, text=True, capture_output=True)
    assert done.returncode == code
    assert (cluster / "scontrol").exists() == again
    assert f"restarts: {count}\n" in done.stdout  # jaxlm is told
    if again:
        assert (cluster / "scontrol").read_text().split() == ["requeue", "42"]
        assert f"start {count + 2} follows" in done.stdout
    elif code:
        assert "not started again" in done.stdout


def test_processes_per_node(capsys):
    each = dry(slurm, ["--nodes=2", "--gpus_per_node=4"], capsys)
    assert "--ntasks-per-node=4\n" in each
    assert "--gpus-per-node=4\n" in each
    node = dry(slurm, ["--nodes=2", "--gpus_per_node=4", "--process=node"], capsys)
    assert "--ntasks-per-node=1\n" in node
    cpu = dry(slurm, ["--process=node", "--gpus_per_node=0"], capsys)
    assert "--gpus" not in cpu


@pytest.mark.skipif(not SHELLCHECK, reason="needs shellcheck (extra dev)")
def test_shellcheck_finds_nothing():
    plain = ["python", "-m", "jaxlm.train", "--config=configs/a b.py"]
    job = slurm.script(*_parsed(slurm, ["--env=A=b c", "--srun=--label"], plain))
    worker = tpu_vm.remote(*_parsed(tpu_vm, [*VM, "--env=A=b c"], plain))
    for script in (job, f"#!/bin/bash\n{worker}\n"):
        call = [SHELLCHECK, "--severity=style", "-"]
        done = subprocess.run(call, input=script, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout


def _parsed(module, options, command):
    p = module.parser()
    return p, *p.split([*options, "--", *command])


# ---------------------------------------------------------------- Kubernetes


@pytest.mark.parametrize("options", [TPU, GPU, [*TPU, "--slices=2", "--spot"]])
def test_the_manifest_is_a_jobset(options, capsys):
    """Held against the models that are generated from the API's published description."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="needs the extra dev")
    more = [VOLUME, "--queue=team", "--service_account=me", "--env=A=b"]
    manifest = _manifest(dry(gke, [*options, *more], capsys))
    read = models.JobsetV1alpha2JobSet.from_dict(manifest)
    assert not lost(manifest, read.to_dict()), "fields that the API does not know"
    (rule,) = read.spec.failure_policy.rules
    assert rule.action in type(rule).model_fields["action"].description.split("Valid values")[1]
    (replicated,) = read.spec.replicated_jobs
    job = replicated.template.spec
    assert job.backoff_limit == 0, "one pod fails: all start again"
    assert job.template.spec.restart_policy == "Never", "as a pod failure policy demands"
    assert job.template.spec.containers[0].command == COMMAND


def test_an_unknown_field_would_be_seen(capsys):
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="needs the extra dev")
    manifest = _manifest(dry(gke, [*TPU, VOLUME], capsys))
    manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["backOffLimit"] = 1
    read = models.JobsetV1alpha2JobSet.from_dict(manifest).to_dict()
    assert lost(manifest, read) == ["/spec/replicatedJobs/0/template/spec/backOffLimit"]


def lost(given, read, path=""):
    """The paths of values that did not come back, or came back changed."""
    if isinstance(given, dict) and isinstance(read, dict):
        pairs = [(name, value, read.get(name)) for name, value in given.items()]
    elif isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        pairs = [(i, *both) for i, both in enumerate(zip(given, read, strict=True))]
    else:
        return [] if given == read else [path]
    return [fault for name, a, b in pairs for fault in lost(a, b, f"{path}/{name}")]


def _manifest(printed):
    head, _, text = printed.partition("\n")
    assert head == "# would run: kubectl create -f - < this manifest"
    return yaml.safe_load(text)


def test_yaml_reads_back():
    odd = ["no", "1", "a: b", "- x", "", "#", "it's", 'a"b', "é\n", "metadata.annotations['a/b-c']"]
    value = {"a": odd, "b/c": {"empty": {}, "none": [], "yes": True}, "n": [[1, {"x": [2]}], None]}
    assert yaml.safe_load(launch_yaml.dump(value)) == value


def test_gpu_pods_are_told_where_process_0_is(capsys):
    manifest = _manifest(dry(gke, [*GPU, VOLUME, "--name=big"], capsys))
    job = manifest["spec"]["replicatedJobs"][0]
    pod = job["template"]["spec"]["template"]["spec"]
    env = {e["name"]: e.get("value") for e in pod["containers"][0]["env"]}
    network = manifest["spec"]["network"]
    host = f"big-{job['name']}-0-0.{network['subdomain']}"  # JobSet's rule for the first pod
    assert env["JAX_COORDINATOR_ADDRESS"] == f"{host}:8476"
    assert env["JAX_NUM_PROCESSES"] == "4"
    assert "JAX_PROCESS_ID" in env
    attempt = "metadata.annotations['jobset.sigs.k8s.io/restart-attempt']"
    told = {e["name"]: e.get("valueFrom") for e in pod["containers"][0]["env"]}
    assert told["JAXLM_RESTARTS"] == {"fieldRef": {"fieldPath": attempt}}
    alone = _manifest(dry(gke, ["--gpu=nvidia-l4", "--image=i", VOLUME], capsys))
    assert "JAX_" not in json.dumps(alone)


@pytest.mark.parametrize(
    ("topology", "chips", "hosts", "kind"),
    [
        ("v5e:16x16", 256, 64, "v5litepod-256"),
        ("v5e:1x1", 1, 1, "v5litepod-1"),
        ("v4:2x2x1", 4, 1, "v4-8"),
        ("v5p:4x4x8", 128, 32, "v5p-256"),
        ("v6e:2x4", 8, 2, "v6e-8"),
    ],
)
def test_slices(topology, chips, hosts, kind):
    found = tpus.parse(topology)
    assert (found.chips, found.hosts, found.type) == (chips, hosts, kind)


XPK = shutil.which("xpk")


@pytest.mark.slow
@pytest.mark.skipif(not XPK, reason="needs xpk on the PATH (pip install xpk)")
@pytest.mark.parametrize("options", [[*TPU, "--slices=2"], GPU])
def test_xpk_reads_its_command_line(options, capsys):
    out = dry(gke, [*options, "--via=xpk", "--cluster=c", "--env=A=b", "--name=big"], capsys)
    call = words(out.partition(": ")[2])
    parse = (
        "import argparse, json, sys; from xpk.parser.core import set_parser;"
        "p = argparse.ArgumentParser(); set_parser(p); a = p.parse_args(sys.argv[1:]);"
        "print(json.dumps({k: v for k, v in vars(a).items() if k != 'func'}, default=str))"
    )
    python = Path(XPK).read_text().split("\n")[0].removeprefix("#!")
    done = subprocess.run([python, "-c", parse, *call[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    read = json.loads(done.stdout.splitlines()[-1])
    assert read["workload"] == "big"
    assert read["tpu_type"] == ("v5litepod-256" if options[0] == TPU[0] else None)
    assert read["max_restarts"] == "100"
    assert read["termination_grace_period_seconds"] == "300"
    assert words(read["command"]) == COMMAND


@pytest.mark.slow
@pytest.mark.skipif(not XPK, reason="needs xpk on the PATH (pip install xpk)")
def test_xpk_means_the_same_slices():
    ours = {}
    for name in ("v4:4x4x4", "v5e:16x16", "v5p:4x4x8", "v6e:16x16"):
        found = tpus.parse(name)
        ours[found.type] = [found.topology, found.hosts, found.kind.gke, tpus.HOST_CHIPS]
    ask = (
        "import json, sys; from xpk.core import system_characteristics as s;"
        "known = s.UserFacingNameToSystemCharacteristics; names = sys.argv[1:];"
        "about = lambda k: [k.topology, k.vms_per_slice, k.gke_accelerator, k.chips_per_vm];"
        "print(json.dumps({n: about(known[n]) for n in names}))"
    )
    python = Path(XPK).read_text().split("\n")[0].removeprefix("#!")
    done = subprocess.run([python, "-c", ask, *ours], capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1]) == ours


# ---------------------------------------------------------------- TPU VMs


GCLOUD = """
echo "$4" >> "$FAKE/calls"
case "$3 $4" in
  "queued-resources describe")
    [ -s "$FAKE/states" ] || { echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; }
    head -n 1 "$FAKE/states"
    [ "$(wc -l < "$FAKE/states")" -gt 1 ] && sed -i 1d "$FAKE/states"
    exit 0 ;;
  "queued-resources create") printf "WAITING_FOR_RESOURCES\\nACTIVE\\n" > "$FAKE/states" ;;
  "queued-resources delete") rm "$FAKE/states" ;;
  "tpu-vm ssh")
    for word in "$@"; do case "$word" in --command=*) script=${word#--command=} ;; esac; done
    if [ "$script" != "true" ] && [ ! -e "$FAKE/was-preempted" ]; then
      touch "$FAKE/was-preempted"; echo SUSPENDED > "$FAKE/states"; exit 255
    fi
    HOME=$FAKE bash -c "$script" ;;
esac
"""


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """A gcloud that gives slices at the second question, and preempts the first start."""
    programs = tmp_path / "bin"
    programs.mkdir()
    put(programs / "gcloud", GCLOUD)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(tmp_path))
    monkeypatch.setattr(tpu_vm.time, "sleep", lambda seconds: None)
    return tmp_path


def worked(cloud):
    return (cloud / "calls").read_text().split()


def test_a_preempted_slice_is_asked_for_anew(cloud, capfd):
    name = f"test-{os.getpid()}"
    ends_well = ["bash", "-c", f"echo \"restarts: $JAXLM_RESTARTS\"; touch '{cloud}/trained'"]
    assert tpu_vm.main([*VM, f"--name={name}", "--setup=true", "--delete", "--", *ends_well]) == 0
    asks = [call for call in worked(cloud) if call != "describe"]
    # create, setup, start (preempted); give back, create, setup, start; give back
    assert asks == ["create", "ssh", "ssh", "delete", "create", "ssh", "ssh", "delete"]
    assert (cloud / "trained").exists()
    said = capfd.readouterr().out
    assert "the slices are SUSPENDED: given back and asked for anew" in said
    assert "finished after 2 starts" in said
    assert "restarts: \n" in said  # of the command on these slices: none


@pytest.mark.parametrize(("code", "starts"), [(1, 1), (70, 3)])
def test_only_what_another_start_may_mend_is_started_again(cloud, capfd, code, starts):
    (cloud / "was-preempted").touch()
    options = [*VM, f"--name=test-{os.getpid()}", "--restarts=2", "--", "bash", "-c"]
    assert tpu_vm.main([*options, f'echo "restarts: $JAXLM_RESTARTS"; exit {code}']) == code
    said = capfd.readouterr().out
    told = [line for line in said.splitlines() if line.startswith("restarts")]
    assert told == ["restarts: ", "restarts: 1", "restarts: 2"][:starts]
    assert "to give the slices back: gcloud compute tpus queued-resources delete" in said


def test_an_error_of_gcloud_is_told_and_not_asked_for_ever(cloud, capfd):
    put(
        cloud / "bin" / "gcloud",
        "echo asked >> $FAKE/calls\necho no network >&2\nexit 1\n",
    )
    with pytest.raises(SystemExit, match=r"failed 5 times: gcloud .*\nno network"):
        tpu_vm.main([*VM, "--name=test", "--", "true"])
    assert worked(cloud) == ["asked"] * 5
    out = capfd.readouterr().out
    assert "gcloud failed, 4 more tries: no network" in out
    assert "give the slices back" not in out  # there are none


NO_PROJECT = """
cat >&2 <<'EOF'
ERROR: (gcloud.compute.tpus.queued-resources.describe) Error parsing [queued_resource].
The [queued_resource] resource is not properly specified.
Failed to find attribute [project]. The attribute can be set in the following ways:
- provide the argument `--project` on the command line
- set the property `core/project`
EOF
echo asked >> $FAKE/calls
exit 1
"""


@pytest.mark.parametrize("more", [[], ["--delete"]])
def test_what_no_other_try_mends_is_told_once_and_whole(cloud, capfd, more):
    put(cloud / "bin" / "gcloud", NO_PROJECT)
    with pytest.raises(SystemExit, match=r"Failed to find attribute \[project\](.|\n)*=NAME"):
        tpu_vm.main([*VM, "--name=test", *more, "--", "true"])
    assert worked(cloud) == ["asked"]
    assert capfd.readouterr().out == ""


def test_slices_that_were_refused_are_not_to_be_given_back(cloud, capfd):
    refuse = '"queued-resources create") echo no quota >&2; exit 1 ;;\n'
    put(cloud / "bin" / "gcloud", GCLOUD.replace('"queued-resources create")', refuse + "never)"))
    with pytest.raises(SystemExit, match=r"this failed: gcloud .* create"):
        tpu_vm.main([*VM, "--name=test", "--", "true"])
    assert capfd.readouterr() == ("", "no quota\n")


def test_a_command_that_a_broken_connection_left_is_ended_first(cloud, capfd):
    (cloud / "was-preempted").touch()
    name = f"test-{os.getpid()}"
    left = subprocess.Popen(["sleep", "60"])
    Path(f"/tmp/launch-{name}.pid").write_text(f"{left.pid}\n")
    threading.Thread(target=left.wait, daemon=True).start()  # else a zombie counts as alive
    assert tpu_vm.main([*VM, f"--name={name}", "--", "true"]) == 0
    assert left.wait(10) == -15


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcloud"), reason="needs gcloud")
def test_gcloud_knows_every_word(capsys, tmp_path):
    out = dry(tpu_vm, [*VM, "--slices=2", "--spot", "--project=p", "--delete"], capsys)
    environment = os.environ | {
        "CLOUDSDK_CONFIG": str(tmp_path),
        "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "1",
        "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "1",
    }
    commands = tmp_path / "commands.json"
    commands.write_text(json.dumps([{"command_string": line} for line in out.splitlines()[1:]]))
    call = ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={commands}"]
    done = subprocess.run(call, capture_output=True, text=True, env=environment)
    results = json.loads(done.stdout)
    assert len(results) == 5, done.stderr
    assert [one for one in results if not one["success"]] == []
