#!/bin/sh
# Set up what is missing, and only that: system packages (where root may), .venv, the package in it.
#   tools/setup.sh run     what mounting needs
#   tools/setup.sh bench   what the benchmarks need besides: the peers, and the tools that measure
#   tools/setup.sh test    what the tests and linters need besides (the benchmarks are tested, too)
set -eu
cd "$(dirname "$0")/.."
purpose=${1:-run}

say() { echo "setup: $*" >&2; }
die() { say "$*"; exit 1; }
has() { command -v "$1" >/dev/null 2>&1; }

# Each line: what is wanted, how to see that it is there, its package in Debian, Fedora, Arch (-: has none; the
# benchmarks leave out a peer that is not installed).
needs() {
    cat <<'LIST'
run|libfuse.so.2|libfuse2|fuse-libs|fuse2
run|fusermount3|fuse3|fuse3|fuse3
run|getfattr|attr|attr|attr
bench|mergerfs|mergerfs|-|-
bench|fio|fio|fio|fio
bench|qemu-img|qemu-utils|qemu-img|qemu-img
test|rsync|rsync|rsync|rsync
test|mkfs.ext4|e2fsprogs|e2fsprogs|e2fsprogs
test|mkfs.xfs|xfsprogs|xfsprogs|xfsprogs
test|setpriv|util-linux|util-linux|util-linux
test|mount|mount|util-linux|util-linux
test|fio|fio|fio|fio
test|gcc|gcc|gcc|gcc
test|/usr/include/linux/fuse.h|linux-libc-dev|kernel-headers|linux-api-headers
LIST
}

present() {
    case $1 in
        /*) [ -e "$1" ] ;;
        lib*.so.*) PATH=$PATH:/sbin:/usr/sbin ldconfig -p 2>/dev/null | grep -q "$1" ;;
        *) PATH=$PATH:/sbin:/usr/sbin has "$1" ;;
    esac
}

wanted() { # each purpose needs what the ones before it need
    case $purpose in
        run) [ "$1" = run ] ;;
        bench) [ "$1" != test ] ;;
        test) true ;;
    esac
}

missing() { # the packages, by the column of this system's package manager
    needs | while IFS='|' read -r for what debian fedora arch; do
        wanted "$for" && ! present "$what" || continue
        case $1 in apt-get) package=$debian ;; dnf) package=$fedora ;; *) package=$arch ;; esac
        [ "$package" = - ] || echo "$package"
    done
}

install_packages() {
    for manager in apt-get dnf pacman ""; do has "$manager" && break; done
    packages=$(missing "${manager:-apt-get}" | tr '\n' ' ')
    [ -n "$packages" ] || return 0
    if [ -z "$manager" ] || [ "$(id -u)" != 0 ]; then
        say "please install (as root): $packages"
        return 0
    fi
    say "installing $packages"
    case $manager in
        apt-get)
            DEBIAN_FRONTEND=noninteractive
            export DEBIAN_FRONTEND
            apt-get -qq update
            # shellcheck disable=SC2086 # a list of packages
            apt-get -qq -y --no-install-recommends install $packages >/dev/null
            ;;
        # shellcheck disable=SC2086
        dnf) dnf -q -y install $packages ;;
        # shellcheck disable=SC2086
        pacman) pacman -S --noconfirm --needed $packages ;;
    esac
}

find_python() {
    for python in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do
        if has "$python" && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "$python"
            return
        fi
    done
    die "Python 3.11 or newer is needed; install it, or name it: PYTHON=/path/to/python3 $0"
}

make_venv() {
    [ -x .venv/bin/pip ] && return 0
    say "making .venv"
    if ! "$1" -m venv .venv; then
        rm -rf .venv
        die "the virtual environment could not be made; on Debian: apt-get install python3-venv"
    fi
}

install_package() { # once, and again when pyproject.toml has changed
    case $purpose in
        run) what='.[inotify]' ;;
        bench) what='.[inotify,bench]' ;;
        test) what='.[inotify,test,check]' ;;
    esac
    done_mark=.venv/installed-$purpose
    if [ ! -e "$done_mark" ] || [ pyproject.toml -nt "$done_mark" ]; then
        say "installing imgfs and its requirements into .venv"
        .venv/bin/pip install --quiet --disable-pip-version-check --editable "$what"
        : >"$done_mark"
    fi
}

case $purpose in run | bench | test) ;; *) die "usage: $0 [run|bench|test]" ;; esac
install_packages
make_venv "$(find_python)"
install_package
