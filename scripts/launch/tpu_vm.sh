#!/usr/bin/env bash
# A job on a Cloud TPU slice of several VMs, without Kubernetes: runs the same command on every
# VM of the slice. The processes find each other by themselves. See docs/tpu_pod.md.
#
#   scripts/launch/tpu_vm.sh [--dry-run] NAME ZONE -- ARGUMENT...
#   scripts/launch/tpu_vm.sh [--dry-run] --stop NAME ZONE
#
# NAME and ZONE are the slice's; ARGUMENTs go to `python -m bailing_jax.generate`. Paths in them
# must mean the same on every VM; only VM 0 reads the input and writes the output. PYTHON is the
# interpreter on the VMs (default: ~/bailing/bin/python).
# What a process says is shown here and kept on its VM in ~/bailing-job.log. The job outlives this
# command and its connection: --stop ends it, after what is running has finished. The same command
# goes on where it was.
set -euo pipefail

usage() {
  sed -n '5,6p' "$0" | cut -c3- >&2
  exit 2
}

dry_run='' stop=''
while [[ "${1-}" == --* ]]; do
  case "$1" in
    --dry-run) dry_run=yes ;;
    --stop) stop=yes ;;
    *) usage ;;
  esac
  shift
done

if [[ -n "$stop" ]]; then
  (($# == 2)) || usage
  # The bracket keeps the pattern from finding the shell that looks for it.
  remote="pkill -TERM -f '[b]ailing_jax.generate'"
else
  (($# >= 4)) && [[ "$3" == -- ]] || usage
  # ~ is for the VM to expand; arguments arrive as they are.
  remote="${PYTHON:-~/bailing/bin/python} -m bailing_jax.generate"
  for argument in "${@:4}"; do
    remote+=" $(printf '%q' "$argument")"
  done
  log='~/bailing-job.log' # likewise
  # tail may be faster than the job, and wants a file.
  remote=": >$log; nohup $remote >$log 2>&1 </dev/null & job=\$!"
  remote+="; tail --pid=\$job -n +1 -f $log; wait \$job"
fi

command=(gcloud compute tpus tpu-vm ssh "$1" "--zone=$2" --worker=all "--command=$remote")
if [[ -n "$dry_run" ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
exec "${command[@]}"
