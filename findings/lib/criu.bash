# Sourced after common.bash by findings about CRIU's restores.

# Compiles the C program on stdin against lib/restored.h into $TMP/NAME.
compile() {
    command -v gcc >"$TMP/which" || cannot "needs gcc"
    cat >"$TMP/$1.c"
    gcc -O1 -Wall -I"$LIB" -o "$TMP/$1" "$TMP/$1.c" -lpthread
}

# Starts a program of lib/restored.h in $dir, and waits until it is ready; its pid is in $pid. Usage: start NAME ARG ...
start() {
    dir=$(mktemp -d -p "$TMP")
    mkdir "$dir/images"
    setsid "$TMP/$1" "$dir" "${@:2}" </dev/null >"$dir/said" 2>&1 &
    pid=$!
    STARTED+=("$pid")
    until [ -e "$dir/ready" ]; do
        kill -0 "$pid" 2>"$TMP/kill.err" || { cat "$dir/said" >&2; cannot "the program does not start here"; }
        sleep 0.02
    done
}

# Dumps what start has started. Usage: dump SUITE OPTION ...
dump() {
    run_in "$1" usr/sbin/criu dump -t "$pid" -D "$dir/images" -o dump.log "${@:2}" >"$TMP/said" 2>&1
}

# Restores it in a PID namespace of its own, and waits for its end; what it wrote is in $dir/seen.
restore() {
    touch "$dir/go"
    timeout -s KILL 60 unshare --pid --fork --kill-child --mount-proc \
        "$TMP/$1/root/usr/lib64/ld-linux-x86-64.so.2" --library-path "$TMP/$1/root/usr/lib/x86_64-linux-gnu" \
        "$TMP/$1/root/usr/sbin/criu" restore -D "$dir/images" -o restore.log "${@:2}" >"$TMP/said" 2>&1 &
    local restored=$!
    STARTED+=("$restored")
    wait "$restored" 2>"$TMP/wait.err" || true
    [ -e "$dir/seen" ] || { tail -n 20 "$dir/images/restore.log" >&2; cannot "criu restore fails on this machine"; }
}

# start, dump and restore; then prints what the program saw, each line after the suite's version of CRIU.
# Usage: restored_by SUITE=VERSION NAME ARG ...
restored_by() {
    local suite=${1%%=*} version=${1#*=}
    start "${@:2}"
    dump "$suite" || { cat "$dir/images/dump.log" >&2; cannot "criu dump fails on this machine"; }
    restore "$suite"
    sed "s/^/$version: /" "$dir/seen"
}
