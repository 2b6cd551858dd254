#!/usr/bin/env bash
# Batch inference on a Cloud TPU slice: one process on each of its hosts, found by jax itself.
#
#   scripts/launch/tpu_vm.sh NAME ZONE MESH --model M --input 'gs://bucket/in/*.jsonl' --output gs://bucket/out [FLAG...]
#
# NAME and ZONE are those of a slice that exists already, e.g. from
#   gcloud compute tpus tpu-vm create NAME --zone ZONE --accelerator-type v5litepod-64 --version v2-alpha-tpuv5-lite --spot
# MESH divides the chips of one host: data=8 runs eight copies of the model on a v5e-8 host, data=4,model=2 four on two
# chips each. M must be readable on every host: a hub id, or a folder on a disk that all of them mount.
#
# The script copies the current commit to all hosts, installs it there and starts the job, always with --resume: after a
# preemption create the slice again and run the same command.
set -euo pipefail

if [ "$#" -lt 4 ]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
fi
name=$1 zone=$2 mesh=$3
shift 3

on_all_hosts() {
    gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$1"
}

archive=$(mktemp --suffix .tar.gz)
trap 'rm -f "$archive"' EXIT
git -C "$(dirname "$0")/../.." archive --format tar.gz --output "$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$name:bicache-jax.tar.gz" --zone "$zone" --worker=all
# Some images have a python3 that is too old, beside a newer one; PYTHON names another.
# shellcheck disable=SC2016 # the hosts expand it
on_all_hosts 'for candidate in '"${PYTHON:+$(printf %q "$PYTHON")} "'python3.13 python3.12 python3.11 python3; do
    if "$candidate" -c "import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; then break; fi
    candidate=
done
if [ -z "$candidate" ]; then
    echo "$(hostname): no Python 3.11 or newer with venv; install one (sudo apt install python3.11-venv), or set PYTHON" >&2
    exit 2
fi
mkdir -p bicache-jax && tar -xzf bicache-jax.tar.gz -C bicache-jax && "$candidate" -m venv venv &&
    venv/bin/pip install --quiet "./bicache-jax[tpu,buckets,convert,hub]"'

# `--worker=all` starts the command on all hosts at once. Bad lines of the input are no reason to call the job failed.
flags=$(printf ' %q' --distributed --mesh "$mesh" --resume --errors-status 0 "$@")
on_all_hosts "venv/bin/python bicache-jax/scripts/batch_inference.py$flags"
