# Sourced by every finding. Exit codes: 0 as stated, 1 the behaviour changed, 2 cannot be tried here, 3 another version.
set -euo pipefail
LIB=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
TMP=$(mktemp -d)
STARTED=()
AT_END=()
finish() {
    local code=$? action pid
    for action in ${AT_END[@]+"${AT_END[@]}"}; do eval "$action" || true; done
    for pid in ${STARTED[@]+"${STARTED[@]}"}; do
        disown "$pid" 2>"$TMP/kill.err" || true # or the shell tells of the kill
        kill -KILL "$pid" 2>"$TMP/kill.err" || true
    done
    rm -rf "$TMP"
    exit "$code"
}
trap finish EXIT
trap 'exit 2' INT TERM

cannot() { echo "cannot be tried here: $*" >&2; exit 2; }
other_version() { echo "other version: $*" >&2; exit 3; }
need_root() { [ "$(id -u)" = 0 ] || cannot "needs root"; }

# The kernel series that the finding was seen on.
need_kernel() {
    case "$(uname -r)" in
        "$1"|"$1".*|"$1"-*) ;;
        *) other_version "kernel $(uname -r), the finding was seen on $1" ;;
    esac
    [ "$(uname -m)" = x86_64 ] || other_version "$(uname -m), the finding was seen on x86_64"
}

# Compiles the C program on stdin against lib/memory.h and writes what it prints to $TMP/output.
run_c() {
    command -v gcc >"$TMP/which" || cannot "needs gcc"
    cat >"$TMP/probe.c"
    gcc -O1 -Wall -I"$LIB" -o "$TMP/probe" "$TMP/probe.c" -lpthread
    local code=0
    timeout 60 "$TMP/probe" >"$TMP/output" || code=$?
    [ "$code" != 77 ] || cannot "the kernel lacks what the probe needs"
    [ "$code" = 0 ] || { cat "$TMP/output"; echo "behaviour changed: the probe ended with $code" >&2; exit 1; }
}

# Compares $TMP/output with the expected lines on stdin.
expect_output() {
    cat >"$TMP/expected"
    if diff -u "$TMP/expected" "$TMP/output"; then
        cat "$TMP/output"
        echo "as stated"
    else
        echo "behaviour changed (expected against seen above)" >&2
        exit 1
    fi
}

# Unpacks Debian packages of a suite with what they need into $TMP/SUITE/root, from the mirror of the machine's own
# sources. Usage: debian SUITE PACKAGE=VERSION-PREFIX ...; any other version found is exit 3.
debian() {
    command -v apt-get >"$TMP/which" || cannot "needs Debian's apt-get"
    local suite=$1 uri="" key="" file entry name want found names=()
    shift
    for file in /etc/apt/sources.list.d/*.sources; do
        [ -f "$file" ] || continue
        uri=$(awk '$1 == "URIs:" && $2 ~ /debian\/?$/ { print $2; exit }' "$file")
        key=$(awk '$1 == "Signed-By:" { print $2; exit }' "$file")
        [ -z "$uri" ] || break
    done
    if [ -z "$uri" ] && [ -f /etc/apt/sources.list ]; then
        uri=$(grep -oE '^deb .*' /etc/apt/sources.list | grep -oE '[a-z+]+:[^ ]*debian/?( |$)' | head -1 | tr -d ' ')
    fi
    [ -n "$uri" ] || cannot "found no Debian mirror in this machine's apt sources"
    local dir=$TMP/$suite
    mkdir -p "$dir"/{lists/partial,cache/archives/partial,root}
    : >"$dir/status"
    {
        echo "deb ${key:+[signed-by=$key] }$uri $suite main"
        [ "$suite" != experimental ] || echo "deb ${key:+[signed-by=$key] }$uri sid main"
    } >"$dir/sources.list"
    local apt=(apt-get -qq -o "Dir::Etc::SourceList=$dir/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o "Dir::State=$dir" -o "Dir::State::Lists=$dir/lists" -o "Dir::State::status=$dir/status"
        -o "Dir::Cache=$dir/cache" -o APT::Install-Recommends=false -o Acquire::Languages=none
        -o APT::Sandbox::User=root)
    [ "$suite" != experimental ] || apt+=(-t experimental)
    for entry in "$@"; do names+=("${entry%%=*}"); done
    "${apt[@]}" update >"$TMP/apt.log" 2>&1 || { cat "$TMP/apt.log" >&2; cannot "apt-get update failed"; }
    "${apt[@]}" --download-only -y install "${names[@]}" >"$TMP/apt.log" 2>&1 \
        || { cat "$TMP/apt.log" >&2; cannot "apt-get could not fetch ${names[*]}"; }
    for file in "$dir"/cache/archives/*.deb; do
        for entry in "$@"; do
            name=${entry%%=*} want=${entry#*=}
            [ "$(dpkg-deb -f "$file" Package)" = "$name" ] || continue
            found=$(dpkg-deb -f "$file" Version)
            case "$found" in
                "$want"|"$want"[-+.]*) ;;
                *) other_version "$name $found in $suite, the finding was seen with $want" ;;
            esac
        done
        dpkg -x "$file" "$dir/root"
    done
}

# Runs a program of an unpacked suite with that suite's own loader and libraries: run_in SUITE usr/bin/NAME ARG ...
run_in() {
    local root=$TMP/$1/root program=$2
    shift 2
    "$root/usr/lib64/ld-linux-x86-64.so.2" --library-path "$root/usr/lib/x86_64-linux-gnu" "$root/$program" "$@"
}
