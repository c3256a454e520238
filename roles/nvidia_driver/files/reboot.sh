# Reboots, unless a run is at work on a service of the host: from here to the shutdown nobody else can release or restart one. HAProxy
# ends what it has begun, while the containers still run.
set -eu
umask 077
mkdir -p /run/nemo
set -- sh -c '
  systemctl stop "nemo-proxy-*.socket" || :
  if ! systemctl reboot; then
    for configuration in /etc/nemo/proxy/*.cfg; do
      [ ! -e "$configuration" ] || systemctl start "nemo-proxy-$(basename "$configuration" .cfg).service"
    done
    exit 1
  fi
  # has the locks until it is ended by the shutdown
  setsid sleep 60 </dev/null >/dev/null 2>&1 &'
for state in /var/lib/nemo/*/state.json; do
  [ -e "$state" ] || continue
  service=${state%/state.json}
  service=${service##*/}
  lock=/run/nemo/$service.lock
  if ! flock --nonblock "$lock" true; then
    echo "no reboot while another run is at work on $service: $(cat "$lock")" >&2
    exit 75
  fi
  set -- flock --nonblock "$lock" "$@"
done
exec "$@"
