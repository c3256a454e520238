# Reboots, unless a run is at work on a service of the host: from here to the shutdown nobody else can release or restart one. HAProxy
# has TimeoutStopSec of its unit, 20 s, to end what it has begun, while the containers still run.
set -eu
umask 077
mkdir -p /run/nemo
set -- sh -c '
  for lock; do # for whoever waits; from here on it is the first process that ends the others
    printf "{\"by\": \"%s\", \"since\": \"%s\", \"pid\": 1, \"what\": \"a reboot\"}" \
      "${SUDO_USER:-root}" "$(date --utc +%Y-%m-%dT%H:%M:%SZ)" >"$lock"
  done
  systemctl stop "nemo-proxy-*.socket" || :
  if ! systemctl reboot; then
    for configuration in /etc/nemo/proxy/*.cfg; do
      [ ! -e "$configuration" ] || systemctl start "nemo-proxy-$(basename "$configuration" .cfg).service"
    done
    exit 1
  fi
  # has the locks until it is ended by the shutdown
  setsid sleep 60 </dev/null >/dev/null 2>&1 &' sh
for state in /var/lib/nemo/*/state.json; do
  [ -e "$state" ] || continue
  service=${state%/state.json}
  service=${service##*/}
  lock=/run/nemo/$service.lock
  if ! flock --nonblock "$lock" true; then
    echo "no reboot while another run is at work on $service: $(cat "$lock")" >&2
    exit 75
  fi
  set -- flock --nonblock --conflict-exit-code 75 "$lock" "$@" "$lock"
done
code=0
"$@" || code=$?
[ "$code" != 75 ] || echo "no reboot: another run has just begun on a service of this host" >&2
exit "$code"
