#!/usr/bin/env bash
# CRIU 4.1.1 (Debian trixie, its stable release) on Linux 6.18, x86_64. A process has a socket of IPv4 or IPv6: TCP
# that listens, or UDP, unconnected.
# Expected: it is dumped, or `criu check` tells that it cannot be on this kernel.
# Seen: the dump fails ("Can't get 1:16 opt: Operation not supported", then 1:34), and `criu check` says "Looks good".
# This kernel no longer has SO_PASSCRED and SO_PASSSEC for such sockets, and CRIU asks each socket for them. Unix sockets
# are dumped; CRIU 4.2.1 (sid) dumps all of these.
# Why it matters: with a newer kernel than its release's own (6.12) it can move or save nearly no network service.
. "$(dirname "$0")/lib/common.bash"
. "$LIB/criu.bash"
need_root
need_kernel 6.18
versions="trixie=4.1.1 sid=4.2.1"
for version in $versions; do debian "${version%%=*}" "criu=${version#*=}"; done
compile socket <<'C'
#include "restored.h"
#include <sys/socket.h>
/* DIR FAMILY TYPE */
int main(int argc, char **argv)
{
    live_in(argc, argv);
    if (argc < 4)
        return 77;
    int family = atoi(argv[2]), type = atoi(argv[3]);
    int file = socket(family, type, 0);
    if (file < 0 || (family != AF_UNIX && type == SOCK_STREAM && listen(file, 1)))
        return 77;
    until_dumped();
    end_of_seen(seen());
    return 0;
}
C
try() { # VERSION WHAT FAMILY TYPE
    start socket "$3" "$4"
    if dump "${1%%=*}"; then
        echo "${1#*=}, $2: dumped"
    else
        echo "${1#*=}, $2: $(grep -o "Can't get .* opt: .*" "$dir/images/dump.log" | head -1)"
        kill -KILL "$pid"
        wait "$pid" 2>"$TMP/wait.err" || true
    fi
}
for version in $versions; do
    run_in "${version%%=*}" usr/sbin/criu check >"$TMP/check" 2>&1 || true
    echo "${version#*=}, criu check: $(tail -1 "$TMP/check")"
    try "$version" "TCP over IPv4" 2 1
    try "$version" "TCP over IPv6" 10 1
    try "$version" "UDP" 2 2
    try "$version" "Unix" 1 1
done >"$TMP/output"
expect_output <<'END'
4.1.1, criu check: Looks good.
4.1.1, TCP over IPv4: Can't get 1:16 opt: Operation not supported
4.1.1, TCP over IPv6: Can't get 1:16 opt: Operation not supported
4.1.1, UDP: Can't get 1:16 opt: Operation not supported
4.1.1, Unix: dumped
4.2.1, criu check: Looks good.
4.2.1, TCP over IPv4: dumped
4.2.1, TCP over IPv6: dumped
4.2.1, UDP: dumped
4.2.1, Unix: dumped
END
