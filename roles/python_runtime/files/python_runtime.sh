# Finds the Python that modules will run on; installs the distribution's where there is none.
# Arguments: interpreter path, lowest version, install (yes|no), seconds to wait for the package manager's lock.
# Answers with lines "nemo_python_<key>=<value>"; the exit status is 0 whenever there is an answer.
# POSIX sh only: this runs where nothing else does.
set -u
LC_ALL=C DEBIAN_FRONTEND=noninteractive
export LC_ALL DEBIAN_FRONTEND
interpreter=$1 minimum=$2 install=$3 patience=$4
version='' log=''

answer() { # state
  os=$(. /etc/os-release 2>/dev/null && printf '%s' "${PRETTY_NAME:-}")
  printf 'nemo_python_state=%s\n' "$1"
  printf 'nemo_python_version=%s\n' "$version"
  printf 'nemo_python_os=%s\n' "${os:-an unknown system}"
  printf 'nemo_python_detail=%s\n' "$(printf '%s\n' "$log" | grep . | tail -n 3 | tr '\n\r' '  ')"
  exit 0
}

probe() { # 0: good enough, 3: too old, anything else: there is none
  version=$("$interpreter" -c '
import sys
want = tuple(int(part) for part in sys.argv[1].split("."))
print("%d.%d.%d" % tuple(sys.version_info[:3]))
sys.exit(0 if tuple(sys.version_info[:len(want)]) >= want else 3)' "$minimum" 2>/dev/null)
}

patiently() { # command...: again while another process holds a lock
  until=$(($(date +%s) + patience))
  while :; do
    log=$("$@" 2>&1 </dev/null) && return 0
    case $log in
      *'Could not get lock'* | *'Unable to lock directory'* | *'Unable to acquire'*lock* | *'locked by another process'* | *'process using it'*) ;;
      *) return 1 ;;
    esac
    [ "$(date +%s)" -lt "$until" ] || return 1
    sleep 3
  done
}

probe
case $? in
  0) answer present ;;
  3) answer old ;;
esac
version=''
if [ "$install" != yes ]; then
  answer absent
fi
system=$(. /etc/os-release 2>/dev/null && printf '%s' "${ID:-}-${VERSION_ID:-}")
case $system in # by name: either tool may be on the other's systems
  amzn-2)
    log='Amazon Linux 2 packages nothing newer than Python 3.7'
    answer refused
    ;;
  amzn-*) manager=dnf ;;
  debian-* | ubuntu-*) manager=apt-get ;;
  *) manager=$(command -v apt-get || command -v dnf || echo none) ;;
esac
if [ "${manager##*/}" = apt-get ]; then
  # the binding too: without it the apt module cannot run in check mode
  { patiently dpkg --configure -a &&
    patiently apt-get -q update &&
    patiently apt-get -q -y --no-install-recommends install python3 python3-apt; } || answer failed
elif [ "${manager##*/}" = dnf ]; then
  patiently timeout $((patience + 600)) dnf -q -y install python3 python3-dnf || answer failed
else
  log='neither apt-get nor dnf is there'
  answer failed
fi
log="the packages are installed, but there is no $interpreter"
probe
case $? in
  0) log='' && answer installed ;;
  3) answer old ;;
  *) answer failed ;;
esac
