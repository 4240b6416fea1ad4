#!/bin/sh
# Start imgfs from a fresh checkout, with one command.
#   ./mount.sh [CONFIG [MOUNTPOINT]]   set up what is missing, and mount; without arguments a demonstration store
#   ./mount.sh -u [MOUNTPOINT]         unmount
set -eu
here=$(cd "$(dirname "$0")" && pwd)
imgfs=$here/.venv/bin/imgfs
demo=$here/demo

usage() {
    sed -n '2,4s/^# \{0,1\}//p' "$0"
    exit "$1"
}

make_demo() {
    mkdir -p "$demo/images"
    [ -e "$demo/imgfs.yaml" ] || cat >"$demo/imgfs.yaml" <<'YAML'
# A demonstration store: new images go to fast/, and to big/ once fast/ is full.
store_id: demo
datadirs:
  - fast:200
  - path: big
    priority: 100
file_perm: "0640"
YAML
}

say_what_next() {
    shown=${1#"$PWD"/}
    cat <<TEXT
A demonstration store is mounted at $shown. Try:
  head -c 64M /dev/urandom > /tmp/disk.raw
  cp /tmp/disk.raw $shown/
  ls -l $shown
  getfattr -d $shown/disk.raw
  md5sum $shown/disk.raw
  ls -l ${demo#"$PWD"/}/fast
and unmount it with
  ${0} -u
TEXT
}

case ${1-} in
    -h | --help) usage 0 ;;
    -u)
        [ $# -le 2 ] || usage 2
        [ -x "$imgfs" ] || { echo "mount.sh: nothing was mounted from here yet" >&2; exit 1; }
        exec "$imgfs" umount "${2-$demo/images}"
        ;;
    -*) usage 2 ;;
esac
[ $# -le 2 ] || usage 2

"$here/tools/setup.sh" run
if [ $# = 0 ]; then
    make_demo
    "$imgfs" mount --log-file "$demo/imgfs.log" "$demo/imgfs.yaml" "$demo/images"
    say_what_next "$demo/images"
else
    mountpoint=${2-$(dirname "$1")/images}
    mkdir -p "$mountpoint"
    "$imgfs" mount "$1" "$mountpoint"
    echo "mounted at $mountpoint; unmount it with: $0 -u $mountpoint"
fi
