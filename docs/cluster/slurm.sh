#!/bin/bash
# A sweep on several nodes of Slurm: sbatch docs/cluster/slurm.sh +sweep=paper output_dir=/shared/q ...
# Ray's head and the driver run on the first node, a raylet on each. Started again (--requeue, or by
# hand with the same arguments) it goes on where it was. docs/cluster.md says more.
#SBATCH --job-name=quest_dist
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

PYTHON=${PYTHON:-.venv/bin/python}   # one that every node finds under this path
PORT=${PORT:-$((20000 + SLURM_JOB_ID % 20000))}
ray() { on "$1" "$PYTHON" -m ray.scripts.scripts start --block --disable-usage-stats "${@:2}"; }
on() { exec srun --nodes=1 --ntasks=1 --overlap --nodelist="$1" "${@:2}"; }   # in subshells only

# Whoever reaches Ray's ports may run code as you: they ask for this token, which only the job has.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$("$PYTHON" -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
ip=$(on "${nodes[0]}" hostname --ip-address | awk '{ print $1 }')

# What a node has: its CPUs and GPUs, and for each word of NODE_KINDS that Slurm knows as a feature of
# it one of a resource of that name, which cluster.node_types can name.
has() {
  local kind kinds=""
  for kind in ${NODE_KINDS:-}; do
    if scontrol show node "$1" | grep -qE "ActiveFeatures=(.*,)?$kind(,|\$)"; then
      kinds+="${kinds:+,}\"$kind\":1"
    fi
  done
  echo "--num-cpus=${SLURM_CPUS_PER_TASK:-1}" "--resources={$kinds}" \
    ${SLURM_GPUS_PER_TASK:+"--num-gpus=${SLURM_GPUS_PER_TASK##*:}"}
}

raylets=()
end() {
  trap - EXIT TERM
  if [[ -n ${driver:-} ]]; then kill -TERM "$driver" 2>/dev/null && wait "$driver" || true; fi
  kill "${raylets[@]}" 2>/dev/null || true
  wait || true
}
trap end EXIT
trap 'end; exit 143' TERM

# shellcheck disable=SC2046  # `has` says several words
ray "${nodes[0]}" --head --node-ip-address="$ip" --port="$PORT" --include-dashboard=false \
  $(has "${nodes[0]}") &
raylets+=($!)
sleep "${PAUSE:-10}"
for node in "${nodes[@]:1}"; do
  # shellcheck disable=SC2046
  ray "$node" --address="$ip:$PORT" $(has "$node") &
  raylets+=($!)
done

# A node that comes later gets units as well; one that never does is not waited for.
"$PYTHON" - "$ip:$PORT" "${#nodes[@]}" "${PATIENCE:-300}" <<'END'
import sys, time, ray
address, nodes, patience = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
began, joined = time.monotonic(), 0
while joined < nodes and time.monotonic() - began < patience:
    time.sleep(1)
    try:
        if not ray.is_initialized():
            ray.init(address=address, logging_level="ERROR", log_to_driver=False)
        joined = sum(node["Alive"] for node in ray.nodes())
    except ConnectionError:
        continue
print(f"{joined} of {nodes} nodes joined", flush=True)
sys.exit(joined == 0)
END

RAY_ADDRESS="$ip:$PORT" "$PYTHON" -m quest_dist.sweep "$@" cluster=ray &
driver=$!
wait "$driver"
