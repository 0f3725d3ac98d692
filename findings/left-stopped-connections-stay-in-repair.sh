#!/usr/bin/env bash
# CRIU 4.2.1 (Debian sid), Linux 6.18. criu dump --tcp-established of a process that is to live on.
# Expected: with --leave-stopped the process is left as a stop leaves it, as the name says: SIGCONT, and its connections
# go on, as they do after --leave-running.
# Seen: its sockets stay in TCP_REPAIR. What it sends last, before it ends, is lost, though send says that all is well,
# and its end is told to nobody: the peer waits on.
# Why it matters: whoever keeps the source stopped until a copy lives elsewhere cannot let it go on with a signal alone:
# the sockets must be taken out of repair mode one by one.
. "$(dirname "$0")/lib/common.bash"
need_root
need_kernel 6.18
debian sid criu=4.2.1
cat >"$TMP/talk.c" <<'C'
#include "memory.h"
#include <netinet/in.h>
#include <sys/socket.h>
#define TCP_REPAIR_OPTION 19
/* DIR listen|connect: two ends of a connection over loopback. Files in DIR tell how far each is. */
static void touch(const char *name) { close(open(name, O_CREAT | O_WRONLY, 0600)); }
static void await(const char *name) { while (access(name, F_OK)) usleep(1000); }
int main(int argc, char **argv)
{
    struct sockaddr_in at = { AF_INET, htons(7777), { htonl(INADDR_LOOPBACK) }, { 0 } };
    struct timeval limit = { 3, 0 };
    int one = 1, sock = socket(AF_INET, SOCK_STREAM, 0);
    char byte = 'x';
    if (argc < 3 || chdir(argv[1]))
        return 77;
    if (!strcmp(argv[2], "listen")) {
        setsockopt(sock, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
        if (bind(sock, (void *)&at, sizeof at) || listen(sock, 1))
            return 77;
        touch("listening");
        int peer = accept(sock, NULL, NULL);
        await("go");
        setsockopt(peer, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
        FILE *said = fopen("received.new", "w");
        fprintf(said, "the byte %s", recv(peer, &byte, 1, 0) == 1 ? "arrives" : "does not arrive");
        fprintf(said, ", the end %s\n", recv(peer, &byte, 1, 0) == 0 ? "is told" : "is not told");
        fclose(said);
        return rename("received.new", "received");
    }
    if (connect(sock, (void *)&at, sizeof at))
        return 77;
    touch("connected");
    await("go");
    int repair = -1;
    socklen_t length = sizeof repair;
    getsockopt(sock, IPPROTO_TCP, TCP_REPAIR_OPTION, &repair, &length);
    FILE *said = fopen("sent.new", "w");
    fprintf(said, "in repair mode: %s, send: %zd", repair ? "yes" : "no", send(sock, &byte, 1, MSG_NOSIGNAL));
    fclose(said);
    return rename("sent.new", "sent");
}
C
gcc -O1 -I"$LIB" -o "$TMP/talk" "$TMP/talk.c"
cat >"$TMP/host.sh" <<'S'
set -eu
ip link set lo up
cd "$TMP/$1"
"$TMP/talk" . listen &
listener=$!
until [ -e listening ]; do sleep 0.02; done
setsid "$TMP/talk" . connect </dev/null >/dev/null 2>&1 &
pid=$!
trap 'kill -KILL $pid $listener 2>/dev/null || true' EXIT
until [ -e connected ]; do sleep 0.02; done
mkdir images
"$TMP/sid/root/usr/lib64/ld-linux-x86-64.so.2" --library-path "$TMP/sid/root/usr/lib/x86_64-linux-gnu" \
    "$TMP/sid/root/usr/sbin/criu" dump -t "$pid" -D images -o dump.log --tcp-established --network-lock skip "$1" \
    >said 2>&1 || { cat images/dump.log >&2; exit 2; }
touch go
kill -CONT "$pid" 2>kill.err || [ "$1" = --leave-running ] # it has run on to its end by then
until [ -e sent ] && [ -e received ]; do sleep 0.02; done
echo "$1: $(cat sent), $(cat received)"
S
export TMP
for how in --leave-running --leave-stopped; do
    mkdir "$TMP/$how"
    unshare --net bash "$TMP/host.sh" "$how" || cannot "criu dump fails on this machine"
done >"$TMP/output"
expect_output <<'END'
--leave-running: in repair mode: no, send: 1, the byte arrives, the end is told
--leave-stopped: in repair mode: yes, send: 1, the byte does not arrive, the end is not told
END
