#!/usr/bin/env bash
# CRIU 4.2.1 (Debian sid): the end of a dump to a page server, here CRIU's own on the same host.
# Expected: the dump's last message asks the page server whether all is stored; over loopback the answer takes
# microseconds, since the server has had nothing to do for a while.
# Seen: the answer takes 200 ms, in which the processes stand still. The connection is corked (TCP_CORK) from the start.
# What has to be fast is pushed by TCP_NODELAY, the question for a parent for instance, but not the last message. The
# kernel keeps it until a corked socket's time is over. A process of any size is frozen for so much longer.
# Why it matters: it is most of the freeze of a small process. Who holds the other end cannot end it: only a call on the
# dump's own socket can.
. "$(dirname "$0")/lib/common.bash"
need_root
debian sid criu=4.2.1
mkdir "$TMP/images" "$TMP/stored"
setsid sleep 1000 </dev/null >"$TMP/sleep.log" 2>&1 &
pid=$!
STARTED+=("$pid")
until [ "$(cat "/proc/$pid/comm")" = sleep ] && grep -q "^$pid (sleep) S" "/proc/$pid/stat"; do sleep 0.05; done
port=""
for _ in 1 2 3 4 5; do
    port=$((20000 + RANDOM % 12000))
    run_in sid usr/sbin/criu page-server -D "$TMP/stored" --address 127.0.0.1 --port "$port" -v4 -o server.log \
        >"$TMP/server.said" 2>&1 &
    server=$!
    until grep -q "status-ready" "$TMP/stored/server.log" 2>"$TMP/grep.err" || ! kill -0 "$server" 2>"$TMP/kill.err"; do
        sleep 0.05
    done
    if kill -0 "$server" 2>"$TMP/kill.err"; then STARTED+=("$server") && break; fi
    port=""
done
[ -n "$port" ] || { cat "$TMP/stored/server.log" "$TMP/server.said" >&2; cannot "criu page-server finds no free port"; }
run_in sid usr/sbin/criu dump -t "$pid" -D "$TMP/images" -v4 -o dump.log -R --page-server --address 127.0.0.1 --port "$port" \
    >"$TMP/said" 2>&1 || { tail "$TMP/images/dump.log" >&2; cannot "criu dump fails on this machine"; }
awk -F '[()]' '
    asked != "" && answered == "" { answered = $2 }
    /Disconnect from the page server/ { asked = $2 }
    END {
        wait = (answered - asked) * 1000
        print "the last answer takes", (wait > 150 && wait < 300 ? "200 ms" : "other than 200 ms: " wait)
    }' "$TMP/images/dump.log" >"$TMP/output"
expect_output <<'END'
the last answer takes 200 ms
END
