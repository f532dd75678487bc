#!/usr/bin/env bash
# A real SLURM on one machine for tests: root, no systemd, no cgroups, nothing outside one folder.
# usage: scripts/slurm_local.sh start | stop | status
#   eval "$(scripts/slurm_local.sh start)"    brings it up, or finds it up, and sets SLURM_CONF for sbatch and the like
#   SLURM_LOCAL=FOLDER                        where everything lives; default ${TMPDIR:-/tmp}/slurm_local
#   SLURM_LOCAL_NODES=2                       pretend to be several nodes (a slurmd each; Debian's is built for it)
set -euo pipefail

folder=$(realpath -m "${SLURM_LOCAL:-${TMPDIR:-/tmp}/slurm_local}")
export SLURM_CONF=$folder/slurm.conf
host=${HOSTNAME%%.*}
# Once it is up, the file says how many.
n_nodes=$(sed -n 's/^# nodes: //p' "$SLURM_CONF" 2>/dev/null || true)
n_nodes=${n_nodes:-${SLURM_LOCAL_NODES:-1}}
nodes=("$host")
((n_nodes == 1)) || mapfile -t nodes < <(seq -f "$host-%g" "$n_nodes")
daemons=(slurmctld "${nodes[@]/#/slurmd-}" munged)

say() { echo "slurm_local.sh: $*" >&2; }

alive() { # DAEMON
  # The command line is compared too: after a crash the number may be another process's, and a zombie has none.
  local pid
  pid=$(cat "$folder/$1.pid" 2>/dev/null) || return
  tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -q "^${1%%-*} .*$folder/"
}

require_tools() {
  local tool
  for tool in slurmctld slurmd munged mungekey sinfo; do
    command -v "$tool" >/dev/null && continue
    say "no $tool here; install it: apt-get update && apt-get install -y --no-install-recommends slurm-wlm munge"
    exit 2
  done
  [[ $(id -u) == 0 ]] || { say "slurmd starts jobs as their users and so must be root; run this as root"; exit 2; }
}

free_port() { # FIRST
  local port=$1
  while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
  echo "$port"
}

write_configuration() {
  local memory cpus node port
  memory=$(slurmd -C | grep -o 'RealMemory=[0-9]*' | cut -d= -f2)
  cpus=$(($(nproc) / n_nodes))
  # cred_expire: a requeued job waits for the old credential to expire, by default 120 s.
  # linuxproc, task/none: the plugins that need no cgroups. cons_tres with memory: arrays start side by side.
  # sched_*, bf_interval, batch_sched_delay: schedule at once, a test does not wait for the next half minute.
  # preempt/partition_prio: a job in `high` requeues one in `main`. filetxt: `sacct --completion` without a database.
  cat >"$SLURM_CONF" <<CONF
# nodes: $n_nodes
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port 26817)
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=100000,batch_sched_delay=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/linux
JobCompType=jobcomp/filetxt
JobCompLoc=$folder/log/jobcomp.log
AccountingStorageType=accounting_storage/none
MinJobAge=3600
KillWait=5
MailProg=/bin/true
GresTypes=gpu
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
  # Below the ports that Linux gives to outgoing connections: one of those could be taken with nobody listening.
  port=27818
  for node in "${nodes[@]}"; do
    port=$(free_port "$port")
    echo "NodeName=$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$port CPUs=$((cpus > 1 ? cpus : 1))" \
      "RealMemory=$(((memory - 1000) / n_nodes)) Gres=gpu:1 State=UNKNOWN"
    port=$((port + 1))
  done >>"$SLURM_CONF"
  # A GPU that is not there: a job that asks for one gets CUDA_VISIBLE_DEVICES=0 and can be tested on any machine.
  echo "Name=gpu Count=1 File=/dev/null" >"$folder/gres.conf"
}

start_daemons() {
  # Its own munged, beside the system's if there is one: another key and socket, and it dies with the folder.
  [[ -s $folder/munge.key ]] || mungekey --create --keyfile "$folder/munge.key"
  # --force: it warns, instead of refusing, where other users cannot reach the socket, as below a private temp folder.
  alive munged || munged --force --key-file "$folder/munge.key" --socket "$folder/munge.socket" \
    --pid-file "$folder/munged.pid" --log-file "$folder/log/munged.log" --seed-file "$folder/munge.seed"
  # The ports are in the file that running daemons have read.
  alive slurmctld || alive "slurmd-${nodes[0]}" || write_configuration
  alive slurmctld || slurmctld -f "$SLURM_CONF"
  local node named=()
  for node in "${nodes[@]}"; do
    ((n_nodes == 1)) || named=(-N "$node")
    mkdir -p "$folder/spool-$node"
    alive "slurmd-$node" || slurmd "${named[@]}" -f "$SLURM_CONF"
  done
}

ready() {
  local up
  up=$(sinfo --noheader --Node --partition=main --format %t 2>/dev/null | grep -Ecx 'idle|mix|alloc') || return
  ((up == n_nodes))
}

start() {
  require_tools
  mkdir -p "$folder"/{state,log}
  # munged refuses a key or socket in a folder that others may write to, whatever the caller's umask.
  chmod 755 "$folder" "$folder/log"
  start_daemons
  for _ in $(seq 150); do
    ready && break
    sleep 0.1
  done
  if ! ready; then
    say "not every node is up after 15 s; the logs are in $folder/log, their ends:"
    tail -n 5 "$folder"/log/*.log >&2
    stop
    exit 1
  fi
  say "up: $(sinfo --noheader --format '%P %t %c cores' | tr '\n' ' ')"
  echo "export SLURM_CONF=$SLURM_CONF"
}

cancel_jobs() {
  alive slurmctld && alive "slurmd-${nodes[0]}" || return 0
  # slurmstepd, and so the job, would outlive slurmd.
  squeue --noheader --format %A | sort -u | xargs --no-run-if-empty scancel --quiet || true
  for _ in $(seq 100); do
    [[ -z $(squeue --noheader 2>/dev/null) ]] && return
    sleep 0.1
  done
  say "jobs are still running after 10 s"
}

stop() {
  cancel_jobs
  local daemon
  for daemon in "${daemons[@]}"; do
    alive "$daemon" || continue
    kill "$(cat "$folder/$daemon.pid")"
    for _ in $(seq 100); do
      alive "$daemon" || break
      sleep 0.1
    done
    alive "$daemon" && kill -9 "$(cat "$folder/$daemon.pid")"
    rm -f "$folder/$daemon.pid"
  done
  rm -f "$SLURM_CONF"
  say "stopped; the logs stay in $folder/log"
}

status() {
  local daemon code=0
  for daemon in "${daemons[@]}"; do
    if alive "$daemon"; then echo "$daemon: up"; else echo "$daemon: down" && code=1; fi
  done
  ((code == 0)) && sinfo && squeue
  return "$code"
}

case ${1:-} in
  start | stop | status) "$1" ;;
  *) say "usage: slurm_local.sh start | stop | status"; exit 2 ;;
esac
