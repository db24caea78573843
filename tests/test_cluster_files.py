"""The files of docs/cluster are what Ray, KubeRay and bash take; none was run on a real cluster."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from quest_dist import cluster, compose
from quest_dist.cluster import Cluster

TESTS = Path(__file__).resolve().parent
FOLDER = TESTS.parent / "docs" / "cluster"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="not a checkout of the repository")
#: Fields of ray.io/v1 (ray-operator/apis/ray/v1/*_types.go): those it requires, and others it has.
FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "job": (
        {"rayClusterSpec"},
        {"entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit"},
    ),
    "cluster": ({"headGroupSpec"}, {"workerGroupSpecs", "rayVersion", "enableInTreeAutoscaling"}),
    "head": ({"rayStartParams", "template"}, {"serviceType", "enableIngress"}),
    "worker": (
        {"groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"},
        {"replicas", "numOfHosts", "scaleStrategy"},
    ),
}


def loaded(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())
    return found


def test_ray_takes_the_cluster_of_ray_up() -> None:
    import jsonschema
    import ray.autoscaler
    from ray.autoscaler._private import util

    config = loaded("ray-up.yaml")
    schema = Path(ray.autoscaler.__file__).parent / "ray-schema.json"
    jsonschema.validate(config, json.loads(schema.read_text()))
    util.validate_config(util.prepare_config(config))
    assert config["head_node_type"] in config["available_node_types"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**config, "head_node": {}}, json.loads(schema.read_text()))


def test_kuberay_takes_the_job() -> None:
    job = loaded("rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]["rayClusterSpec"]
    parts = [("job", job["spec"]), ("cluster", spec), ("head", spec["headGroupSpec"])]
    parts += [("worker", group) for group in spec["workerGroupSpecs"]]
    for name, part in parts:
        required, others = FIELDS[name]
        assert required <= part.keys() <= required | others, name
    for name, part in parts[2:]:
        assert all(isinstance(value, str) for value in part["rayStartParams"].values()), name
        (container,) = part["template"]["spec"]["containers"]
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts <= {volume["name"] for volume in part["template"]["spec"]["volumes"]}
    marks = {
        name
        for group in spec["workerGroupSpecs"]
        for name in json.loads(json.loads(group["rayStartParams"]["resources"]))
    }
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "quest_dist.sweep"]
    assert not set("{}") & set("".join(words)), "they do not survive the shell"
    settings = Cluster(**compose.composed(words[3:])["cluster"])
    cluster.check(settings)
    assert {kind.resource for kind in settings.types.values()} == marks


FAKE = {
    "srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"\n',
    "scontrol": (
        'case "$*" in\n'
        '  "show hostnames one,two") printf "one\\ntwo\\n" ;;\n'
        '  "show node two") echo "   ActiveFeatures=rack1,quick" ;;\n'
        '  *) echo "   ActiveFeatures=rack1" ;;\n'
        "esac\n"
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_slurm_script_starts_a_cluster_and_the_sweep(tmp_path: Path) -> None:
    """Whole, but for Slurm: srun and scontrol stand in, and both nodes are this machine."""
    for name, text in FAKE.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / name).chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_"))}
    env = {
        **kept,
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}",
        **{"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "one,two"},
        **{"SLURM_CPUS_PER_TASK": "1", "NODE_KINDS": "quick slow"},
        **{"PYTHON": sys.executable, "PAUSE": "3", "PATIENCE": "60"},
    }
    run = subprocess.run(
        [
            *("bash", str(FOLDER / "slurm.sh"), "+sweep=smoke", "plan=false"),
            *("tracking=none", f"output_dir={tmp_path / 'out'}", "limit=1", "grid.method=[full]"),
            "grid.task=[kernels_512]",  # needs no weights
            *("cluster.cpus_per_worker=1", "+cluster.node_types.quick.resource=quick"),
        ],
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
        cwd=TESTS.parent,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 of 2 nodes joined" in run.stdout
    assert list((tmp_path / "out").rglob("points.csv"))
