# Finds the Python that modules will run on. Installs the distribution's where there is none, and the project's own,
# relocatable one where that is wanted.
# Arguments: interpreter path, lowest version, install (yes|no), seconds to wait for a lock, relocatable (yes|no), its
# version (<CPython>+<release>), the mirror, the file's digests for x86_64 and aarch64, seconds that the download may take.
# Answers with lines "nemo_python_<key>=<value>"; the exit status is 0 whenever there is an answer.
# POSIX sh only: this runs where nothing else does.
set -u
LC_ALL=C DEBIAN_FRONTEND=noninteractive
export LC_ALL DEBIAN_FRONTEND
umask 022
interpreter=$1 minimum=$2 install=$3 patience=$4 relocatable=$5 wanted=$6 mirror=$7 digest_x86_64=$8 digest_aarch64=$9
shift 9
download_time=$1
root=/opt/nemo/python
version='' log='' ours='' work=''

answer() { # state
  os=$(. /etc/os-release 2>/dev/null && printf '%s' "${PRETTY_NAME:-}")
  printf 'nemo_python_state=%s\n' "$1"
  printf 'nemo_python_version=%s\n' "$version"
  printf 'nemo_python_os=%s\n' "${os:-an unknown system}"
  printf 'nemo_python_relocatable=%s\n' "$ours"
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

# The relocatable Python: $root/<version>, with the digest of the file it came from, and the link $root/current.

runs() { # folder: holds the wanted file's contents, and they run
  [ "$(cat "$1/.nemo-digest" 2>/dev/null)" = "$digest" ] && "$1/bin/python3" -c '' >/dev/null 2>&1
}

fetch_with_python() { # python, address, file: for a host that has neither curl nor wget
  "$1" -c '
import sys
try:
    from urllib.request import urlopen
except ImportError:
    from urllib2 import urlopen
source = urlopen(sys.argv[1], timeout=60)
with open(sys.argv[2], "wb") as target:
    for block in iter(lambda: source.read(1 << 20), b""):
        target.write(block)' "$2" "$3"
}

fetch() { # address, file: goes on where an interrupted download ended; the message is in $log
  if command -v curl >/dev/null; then
    log=$(curl --fail --location --silent --show-error --connect-timeout 20 --speed-limit 1000 --speed-time 60 \
      --max-time "$download_time" --continue-at - --output "$2" "$1" 2>&1 </dev/null 9>&-)
    status=$?
    # 33: the server cannot go on in the middle; 22 with a part: it says that there is nothing behind it
    if [ $status -eq 33 ] || { [ $status -eq 22 ] && [ -s "$2" ]; }; then
      rm -f "$2"
      return 75
    fi
    return $status
  elif command -v wget >/dev/null; then
    rm -f "$2"
    log=$(timeout "$download_time" wget -nv --tries=2 --timeout=60 -O "$2" "$1" 2>&1 </dev/null 9>&-)
  else
    for python in python3 /usr/libexec/platform-python python2 python; do
      command -v $python >/dev/null || continue
      rm -f "$2"
      log=$(fetch_with_python $python "$1" "$2" 2>&1 </dev/null 9>&-)
      return
    done
    log='there is no curl, no wget and no Python to download with: install curl by the package manager'
    return 1
  fi
}

digest_of() { # file
  set -- "$(sha256sum "$1")"
  printf '%s' "${1%% *}"
}

room() { # how much is left, behind a message about a file that cannot be written
  case $log in
    *[Ss]pace* | *[Ww]rit* | *quota*) df -Pk "$root" 2>/dev/null | awk 'NR == 2 { printf " (%d MB free on %s)", $4 / 1024, $6 }' ;;
  esac
}

get() { # archive, address: leaves the verified file
  tries=0
  while :; do
    if [ -s "$1" ]; then
      found=$(digest_of "$1")
      [ "$found" = "$digest" ] && return 0
    fi
    if [ $tries -ge 3 ]; then
      log="$2 could not be downloaded: $log$(room)"
      return 1
    fi
    tries=$((tries + 1))
    resumed=no
    if [ -s "$1" ]; then resumed=yes; fi
    if fetch "$2" "$1"; then
      found=$(digest_of "$1")
      [ "$found" = "$digest" ] && return 0
      rm -f "$1"
      # the part that was there may have been another file's
      [ $resumed = yes ] && continue
      log="$2 is not the file that is pinned, nothing was unpacked: expected sha256 $digest, found $found"
      return 1
    fi
    case $log in *'no curl, no wget'*) return 1 ;; esac
    sleep 1
  done
}

unpack() { # archive: into $root/$wanted, which appears whole or not at all
  work=$(mktemp -d "$root/.unpack.XXXXXX") || { log="no folder can be made below $root"; return 1; }
  log=$(tar -xzf "$1" -C "$work" --no-same-owner 2>&1) || { log="$1 could not be unpacked: $log$(room)"; return 1; }
  python=$work/python/bin/python3
  log=$("$python" -c 'import ctypes, hashlib, json, ssl, zlib' 2>&1) || { log="the Python of $1 does not run here: $log"; return 1; }
  # Compiled now and by root: operators, who cannot write there, would compile it in each start of a program.
  "$python" -m compileall -q -x '/(test|idlelib|lib2to3|site-packages)/' "$work/python/lib" >/dev/null 2>&1 || :
  printf '%s\n' "$digest" >"$work/python/.nemo-digest" && sync || { log="$work cannot be written"; log="$log$(room)"; return 1; }
  if [ -e "$root/$wanted" ]; then # of another digest, or damaged
    mv -T "$root/$wanted" "$work/replaced" || { log="$root/$wanted cannot be replaced"; return 1; }
  fi
  log=$(mv -T "$work/python" "$root/$wanted" 2>&1) || return 1
  rm -rf "$work" # before the link: a run that finds the link in place looks no further
}

switch() { # the link points to the wanted version
  rm -f "$root/.current.new"
  log=$(ln -s "$wanted" "$root/.current.new" 2>&1 && mv -T "$root/.current.new" "$root/current" 2>&1)
}

relocatable_python() { # 0: there; 1: failed, $log says why; 4: check mode and not there
  case $(uname -m) in
    x86_64) digest=$digest_x86_64 ;;
    aarch64) digest=$digest_aarch64 ;;
    *) digest='' ;;
  esac
  case $wanted in
    *[!0-9.+]* | *+*+* | +* | *+) release='' ;;
    *+*) release=${wanted#*+} ;;
    *) release='' ;;
  esac
  if [ -z "$release" ]; then
    log="python_runtime_relocatable_version is '$wanted'; allowed: <CPython>+<release>, for example 3.13.15+20260814"
    return 1
  fi
  if [ -z "$digest" ]; then
    log="python_runtime_relocatable_version is '$wanted', and python_runtime_relocatable_digests has no digest of it for $(uname -m)"
    return 1
  fi
  ours=$wanted
  [ "$(readlink "$root/current" 2>/dev/null)" = "$wanted" ] && runs "$root/current" && return 0
  [ "$install" = yes ] || return 4
  for tool in awk flock gzip mktemp sha256sum tar; do
    command -v $tool >/dev/null || { log="$tool is missing; it is needed to install $root/$wanted"; return 1; }
  done
  log=$(mkdir -p "$root" 2>&1) || return 1
  log=$(touch "$root/.lock" 2>&1) || return 1
  exec 9>>"$root/.lock" # not >: a second run must not wipe out who holds it
  if ! flock -w "$patience" 9; then
    log="another run installs into $root since $patience seconds ($(tail -n 1 "$root/.lock")); remove nothing, it goes away with that process"
    return 1
  fi
  printf 'process %s, since %s\n' "$$" "$(date)" >"$root/.lock"
  rm -rf "$root"/.unpack.* # of runs that were cut off
  if ! runs "$root/$wanted"; then
    name=cpython-${wanted%%+*}%2B$release-$(uname -m)-unknown-linux-gnu-install_only_stripped.tar.gz
    archive=$root/.download.$wanted.tar.gz
    trap 'rm -rf ${work:+"$work"}' EXIT
    trap 'exit 1' HUP INT TERM
    get "$archive" "$mirror/$release/$name" && unpack "$archive" || return 1
    rm -f "$root"/.download.*
  fi
  switch || return 1
  installed=yes
}

installed=no
case $interpreter in
  "$root"/*)
    relocatable_python
    case $? in
      0) ;;
      4)
        probe && ours="planned: $wanted" && answer present
        version=''
        answer absent
        ;;
      *) answer relocatable ;;
    esac
    probe
    case $? in
      0) if [ $installed = yes ]; then answer installed; else answer present; fi ;;
      3) answer old ;;
    esac
    log="$root/$wanted is installed, but there is no $interpreter"
    answer failed
    ;;
esac

finish() { # state of the system's Python: the relocatable one beside it
  if [ "$relocatable" = yes ]; then
    relocatable_python
    case $? in
      0) if [ $installed = yes ]; then answer installed; fi ;;
      4) ours="planned: $wanted" ;;
      *) answer relocatable ;;
    esac
  fi
  answer "$1"
}

probe
case $? in
  0) finish present ;;
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
  0) log='' && finish installed ;;
  3) answer old ;;
  *) answer failed ;;
esac
