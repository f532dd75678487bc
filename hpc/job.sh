# shellcheck shell=bash
# Sourced by the jobs, after cluster_settings.sh. `run_job FOLDER COMMAND FLAGS…` runs a command of Tiller, passes on
# the signals that the job gets, queues the job again when the command exits 75 (stopped, can go on), and exits with
# the command's code. FOLDER may be empty; if it is not, a command that exits 0 without a DONE there has failed.

child=
told_to_end=
interrupted=

# shellcheck disable=SC2317  # the traps call it
forward() { # SIGNAL
  [[ $1 != TERM ]] || told_to_end=yes
  interrupted=yes
  [[ -z $child ]] || kill -s "$1" "$child" 2>/dev/null || true
}

run_job() { # FOLDER COMMAND FLAGS…
  local folder=$1 code job name=${SLURM_JOB_NAME:-job}
  shift
  # shellcheck disable=SC2154  # of cluster_settings.sh
  # The launcher is the cluster's and stays outside: there is no srun in an image.
  local command=(${launcher[@]+"${launcher[@]}"} "${container[@]}" "${runner[@]}" -m "src.$1" "${@:2}")
  job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
  job=${job:-${SLURM_JOB_ID:-local}}
  printf '%s: job %s on %s, start %s:' "$name" "$job" "$(uname -n)" "$((${SLURM_RESTART_COUNT:-0} + 1))"
  printf ' %q' "${command[@]}"
  echo
  trap 'forward USR1' USR1
  trap 'forward TERM' TERM
  # In the background: bash runs no trap while it waits for a command in the foreground.
  "${command[@]}" &
  child=$!
  while true; do
    interrupted=
    code=0
    wait "$child" || code=$?
    # A signal ends `wait` early. The command's own code is still there to be asked for.
    [[ -n $interrupted ]] || break
  done
  # SIGTERM means that SLURM ends the job: a cancelled one must stay so, a preempted one is queued again by SLURM itself.
  if [[ $code == 75 && -z $told_to_end ]]; then
    echo "$name: stopped before it was done and can go on: queueing job $job again"
    scontrol requeue "$job" || echo "$name: could not requeue; submit the same command again to go on" >&2
  fi
  if [[ $code == 0 && -n $folder && ! -e $folder/DONE ]]; then
    echo "$name: the command exited 0 but there is no $folder/DONE: counted as failed" >&2
    code=1
  fi
  exit "$code"
}
