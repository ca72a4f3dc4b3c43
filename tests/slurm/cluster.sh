#!/usr/bin/env bash
# A Slurm of two nodes on this machine, with accounting and two GPUs that are none, for tests.
#
#   cluster.sh start DIR   then: . DIR/environment
#   cluster.sh stop DIR
#
# Keys, sockets, logs, database and configuration are in DIR, ports are free ones: a Slurm that is there is left alone.
# Needs root, and the programs of the Debian packages slurm-wlm, slurmdbd, munge and mariadb-server.
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"

start() {
    mkdir -p "$dir"/{munge,mysql,spool,state,log,bin,pid}
    cd "$dir"
    read -r ctld dbd sql first second < <(python3 -c '
import socket
ports = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
for port in range(10000, 20000):  # the ports of the nodes follow each other
    try:
        nodes = [socket.create_server(("127.0.0.1", port + i)) for i in range(2)]
        break
    except OSError:
        pass
print(*(s.getsockname()[1] for s in ports + nodes))')

    head -c 128 /dev/urandom > munge/key
    chmod 600 munge/key
    # --force: the folder need not be open to others, all is root's here
    munged --force --key-file "$dir/munge/key" --socket "$dir/munge/socket" --pid-file "$dir/pid/munged" \
        --log-file "$dir/log/munged" --seed-file "$dir/munge/seed"

    mariadb-install-db --no-defaults --user=root --datadir="$dir/mysql" --auth-root-authentication-method=normal \
        --skip-test-db > log/mariadb-install 2>&1
    mariadbd --no-defaults --user=root --datadir="$dir/mysql" --socket="$dir/mysql/socket" --bind-address=127.0.0.1 \
        --port="$sql" --pid-file="$dir/pid/mariadbd" > log/mariadbd 2>&1 &
    until_true mariadb --no-defaults --socket="$dir/mysql/socket" --user=root --execute="
        CREATE USER slurm@localhost; GRANT ALL ON slurm_acct_db.* TO slurm@localhost"

    cat > slurmdbd.conf <<END
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
DbdHost=localhost
DbdPort=$dbd
SlurmUser=root
LogFile=$dir/log/slurmdbd
PidFile=$dir/pid/slurmdbd
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$sql
StorageUser=slurm
END
    chmod 600 slurmdbd.conf

    # cred_expire is also how long a requeued job waits. The nodes claim more than this machine has (config_overrides).
    cat > slurm.conf <<END
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$ctld
SlurmctldPidFile=$dir/pid/slurmctld
SlurmctldLogFile=$dir/log/slurmctld
SlurmdPidFile=$dir/pid/slurmd-%n
SlurmdLogFile=$dir/log/slurmd-%n
SlurmdSpoolDir=$dir/spool/%n
SlurmdParameters=config_overrides
StateSaveLocation=$dir/state
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MailProg=/bin/true
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=5,bf_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort=$dbd
AccountingStoragePass=$dir/munge/socket
AccountingStorageEnforce=associations,limits,qos
AccountingStorageTRES=gres/gpu
AccountingStoreFlags=job_comment
JobCompType=jobcomp/none
GresTypes=gpu
NodeName=n[1-2] NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=[$first-$second] CPUs=4 RealMemory=64000 Gres=gpu:1
PartitionName=everyday Nodes=n[1-2] Default=YES MaxTime=1-0
PartitionName=all Nodes=n[1-2] MaxTime=1-0
END
    echo "Name=gpu File=/dev/null" > gres.conf

    # The steps of a job do not get the variables SLURM_* of the job, and so would not find their Slurm.
    printf '#!/bin/sh\nSLURM_CONF="%s" exec "%s" "$@"\n' "$dir/slurm.conf" "$(command -v srun)" > bin/srun
    chmod +x bin/srun
    printf 'export SLURM_CONF="%s" PATH="%s:$PATH"\n' "$dir/slurm.conf" "$dir/bin" > environment
    . ./environment

    slurmdbd
    until_true sacctmgr --immediate add cluster test
    slurmctld -c
    until_true scontrol ping
    slurmd -N n1
    slurmd -N n2
    for account in 2024-17 maths; do
        sacctmgr --immediate add account $account cluster=test > /dev/null
        sacctmgr --immediate add user root account=$account > /dev/null
    done
    sacctmgr --immediate add qos short > /dev/null
    sacctmgr --immediate modify user root set qos=normal,short > /dev/null
    until_true both_idle
}

both_idle() { [ "$(sinfo --noheader --partition everyday --format '%D %t')" = "2 idle" ]; }

# Repeat a command until it succeeds, for at most a minute; then say what it said.
until_true() {
    local said
    for _ in $(seq 120); do
        said=$("$@" 2>&1) && return
        sleep 0.5
    done
    echo "cluster.sh: still failing after a minute: $1 ... ($said); see $dir/log" >&2
    stop
    exit 1
}

stop() {
    [ ! -f "$dir/slurm.conf" ] || SLURM_CONF="$dir/slurm.conf" timeout 10 scancel --user root 2> /dev/null || true
    for signal in TERM KILL; do
        for file in "$dir"/pid/*; do
            [ ! -f "$file" ] || kill -$signal "$(cat "$file")" 2> /dev/null || rm "$file"
        done
        for _ in $(seq 100); do
            running || return 0
            sleep 0.1
        done
    done
}

running() {
    for file in "$dir"/pid/*; do
        [ ! -f "$file" ] || ! kill -0 "$(cat "$file")" 2> /dev/null || return 0
    done
    return 1
}

case "${1-} ${2:+DIR}" in
    "start DIR" | "stop DIR")
        dir=$(realpath -m "$2")
        "$1"
        ;;
    *)
        sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
        exit 2
        ;;
esac
