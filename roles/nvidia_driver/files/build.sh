# Builds the driver's module for the kernel $1 where DKMS knows the driver (nvidia, nvidia-open or nvidia-srv, by whose package it
# is), and no other module of the host's: what fails to build among those is no matter of the driver's.
set -eu
command -v dkms >/dev/null || exit 0
known=$(dkms status | sed -n 's|^\(nvidia[a-z-]*\)[/, ]\{1,2\}\([0-9]\{3\}[.][0-9.]*\)[,:].*|-m \1 -v \2|p' | sort -u -V | tail -n 1)
[ -n "$known" ] || exit 0
# shellcheck disable=SC2086 # words of their own
case $(dkms status $known -k "$1") in
  *installed*) ;;
  *) dkms install $known -k "$1" ;;
esac
