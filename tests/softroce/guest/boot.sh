#!/bin/bash
# Process 1 of the machine, its root in place: devices, modules, names, RDMA, then the agent, which
# runs what the host says. This shell stays, for orphans come to it.
exec </dev/null >/dev/console 2>&1
source /lab/machine.env # KERNEL MODULES NAME RDMA PYTHON AGENT RDMA_SCRIPT

fail() {
  echo "lab: $1"
  echo o > /proc/sysrq-trigger
  sleep 60
}
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
for folder in /dev/shm /run; do mount -t tmpfs -o mode=1777 tmpfs "$folder"; done
ln -sfn /proc/self/fd /dev/fd
mkdir -p /run/lock /usr/lib/modules
ln -sfn "$MODULES" "/usr/lib/modules/$KERNEL"
hostname "$NAME"
printf '127.0.0.1 localhost\n192.0.2.1 lab1\n192.0.2.2 lab2\n' > /etc/hosts
ulimit -l unlimited
ulimit -n 65536
ip link set lo up
modprobe virtio_console || fail "no channel to the host"
if [[ $RDMA ]]; then
  # shellcheck disable=SC2086
  bash "$RDMA_SCRIPT" $RDMA || fail "no RDMA device"
fi
"$PYTHON" -I -S "$AGENT" &
wait $!
fail "the agent ended with $?"
