#!/bin/bash
# RDMA devices rxe0, rxe1, … over interfaces rd0, rd1, …
#
#   rdma.sh alone COUNT           interfaces that lead nowhere: both ends are in this machine
#   rdma.sh joined COUNT NUMBER   over the links to the other machine; this one is NUMBER
#
# Addresses: 192.0.2.NUMBER on rd0, 198.51.100.NUMBER on rd1, 203.0.113.NUMBER on rd2.
set -euo pipefail
nets=(192.0.2 198.51.100 203.0.113)
kind=$1 count=$2 number=${3:-1}
modprobe rdma_rxe
modprobe ib_uverbs
modprobe rdma_ucm
if [[ $kind == joined ]]; then
  modprobe virtio_net
else
  modprobe dummy numdummies=0
fi
for ((i = 0; i < count; i++)); do
  if [[ $kind == joined ]]; then
    for path in /sys/class/net/*; do # the host gave each link's interface a number as its address
      [[ $(< "$path/address") == *":0$i" && $path != */rd* && $path != */lo ]] && ip link set "${path##*/}" name "rd$i"
    done
  else
    ip link add "rd$i" type dummy
  fi
  ip link set "rd$i" mtu 4200 up
  # The default queue drops what waits for long, on a wire that is slow as this one is; RoCE's do not.
  tc qdisc replace dev "rd$i" root pfifo limit 10000
  ip addr add "${nets[i]}.$number/24" dev "rd$i"
  rdma link add "rxe$i" type rxe netdev "rd$i"
done
for ((i = 0; i < count; i++)); do
  for ((turn = 0; turn < 100; turn++)); do
    [[ $(< "/sys/class/infiniband/rxe$i/ports/1/state") == *ACTIVE ]] && continue 2
    sleep 0.1
  done
  echo "rxe$i does not come up"
  exit 1
done
