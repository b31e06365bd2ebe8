#!/usr/bin/env bash
# Submits 3 workloads to a GKE cluster that xpk made, the shards of one study: experiments/study.py.
# They share gs://my-bucket/studies/First Study and nothing else, and Kubernetes restarts each after a preemption: what one leaves
# behind another takes over. Machines, cluster and image are settings of tpu_setup/config.env (SLICES: those of one
# shard, all of whose hosts run the same command). From the root of the repository:
#
#   bash THIS_FILE [--config FILE] [--dry-run]             submit them
#   bash THIS_FILE [--config FILE] [--dry-run] --delete    delete them

set -euo pipefail
workload=tpu_setup/xpk_workload.sh
[ -x "$workload" ] || { echo "Run this from the root of the repository: $workload is not here." >&2; exit 2; }

# shellcheck disable=SC2016  # no word of the command is to be expanded
command=(jaxpo study experiments/study.py --output 'gs://my-bucket/studies/First Study' --processes.platform tpu)
for ((shard = 1; shard <= 3; shard++)); do
  case " $* " in
    *' --delete '*) "$workload" "$@" "study-first-study-f73f2-$shard" ;;
    *) "$workload" "$@" "study-first-study-f73f2-$shard" -- "${command[@]}" --shard "$shard/3" ;;
  esac
done
